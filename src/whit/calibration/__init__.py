"""What the linears of a model see: seeded text, run through the model block by block.

`tokens` makes windows of a text, `runner` runs one block at a time over what `storage` keeps between them, `capture`
takes statistics of linears' inputs, `ranges` their static ranges.
"""

from __future__ import annotations

from whit.calibration.tokens import Calibration, CalibrationTokens

__all__ = ["Calibration", "CalibrationTokens"]
