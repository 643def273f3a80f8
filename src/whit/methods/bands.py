"""Tables of which some rows are used more than others: which row lies in which band, and the codes of each band."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.formats.bands import Bands
from whit.methods.base import Quantizer
from whit.tensor import LayerStats, QuantizedTensor


def in_bands(
    quantizer: Quantizer, weight: Tensor, stats: LayerStats | None, format: Bands, use: Tensor | None
) -> QuantizedTensor:
    """Quantize the bands of (rows, columns) one by one; `use` (rows,) says how often each row is used.

    FormatError where nothing says how often.
    """
    if use is None:
        format.fit(weight)  # raises: without use there are no bands to fit
    codes = format.assigned(use.to(weight.device))
    bands = {f"band{i}": quantizer(weight[codes[0] == i], stats, part) for i, (part, _) in enumerate(format.parts)}
    return QuantizedTensor(format, tuple(weight.shape), codes, bands)


def use_of_rows(tokens: Tensor, rows: int) -> Tensor:
    """How often each token occurs, int64 (rows,): how often its row of an embedding is looked up, and, since a model
    predicts tokens about as often as they occur, what its row of a head is worth."""
    return torch.bincount(tokens.flatten(), minlength=rows)[:rows]
