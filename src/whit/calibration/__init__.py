"""What the linears of a model see: seeded text, run through the model block by block."""

from __future__ import annotations

from whit.calibration.tokens import Calibration, CalibrationTokens

__all__ = ["Calibration", "CalibrationTokens"]
