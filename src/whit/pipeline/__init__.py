"""A run, from what a user asked for to a finished folder: the one way in which whit writes weights.

Before a weight is read: `job` checks the request against the model, `plan` says what becomes of every parameter and
where each byte will lie, `estimate` what it will take. Then `loop` goes over the blocks, and no other module does:
`feed` gives it values (read ahead; or block by block, with what calibration saw; weighed by `importance`, where
given; codes that are carried over come from `transcode`), `parameter` makes one into tensors and a line of the account
(`coverage`), and `finish` writes the small files. Training (`qat`) and merging run it with a feed or a source of their
own.
"""

from __future__ import annotations

from whit.pipeline.loop import dequantize, quantize, run

__all__ = ["dequantize", "quantize", "run"]
