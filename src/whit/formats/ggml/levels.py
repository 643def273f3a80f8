"""The nearest code of a number of steps, for linear types and for tables of levels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.ggml.kinds import Kind


def nearest(steps: Tensor, kind: Kind) -> Tensor:
    """Codes whose levels are nearest to `steps` = (w + offset) / scale."""
    if not kind.levels:
        return steps.round().clamp_(kind.low, kind.high)
    return _table(kind.levels, str(steps.device))[0][_half_steps(steps)]


def nearest_level(steps: Tensor, kind: Kind) -> Tensor:
    """The levels themselves, in float32."""
    if not kind.levels:
        return steps.round().clamp_(kind.low, kind.high)
    return _table(kind.levels, str(steps.device))[1][_half_steps(steps)]


def _half_steps(steps: Tensor) -> Tensor:
    # Levels are integers, so their midpoints are halves: between two halves the nearest level is the same.
    return (steps * 2).floor_().clamp_(-256, 255).add_(256).to(torch.int32)


@lru_cache(maxsize=8)
def _table(levels: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """For each half step [-128, 128): the nearest level's code and the level."""
    centres = (torch.arange(-256, 256, dtype=torch.float64) + 0.5) / 2
    table = torch.tensor(levels, dtype=torch.float64)
    codes = (centres[:, None] - table).abs().argmin(dim=1)
    return codes.to(torch.uint8).to(device), table[codes].to(torch.float32).to(device)
