"""Runs of columns that share a scale, laid so that every sum is a few elementwise additions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from whit.formats.ggml.kinds import Kind
from whit.formats.ggml.levels import nearest_level

LARGEST = torch.finfo(torch.float32).max


def fold(values: Tensor) -> Tensor:
    """(runs, size, rows) summed over the middle dimension, a power of two, by halves: the same bits in any company."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


@dataclass(frozen=True)
class Runs:
    """Values x (runs, size, rows) and their weights w (runs, size, 1), None where all are 1."""

    x: Tensor
    w: Tensor | None

    def weigh(self, values: Tensor) -> Tensor:
        """`values` times the weights, in memory of its own."""
        return values.clone() if self.w is None else values * self.w

    def total(self, values: Tensor) -> Tensor:
        """Weighted sums (runs, rows)."""
        return fold(values if self.w is None else values * self.w)

    def error(self, scale: Tensor, offset: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor]:
        """The squared error (runs, rows) of the nearest codes under s and o (runs, rows), and their levels."""
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale).clamp_(-LARGEST, LARGEST)
        moved = self.x if offset is None else self.x + offset[:, None]
        q = nearest_level(moved * inverse[:, None], kind)
        difference = q * scale[:, None]
        difference -= moved
        return self.total(difference.square_()), q

    @cached_property
    def high(self) -> Tensor:
        return _halve(self.x, torch.maximum)

    @cached_property
    def low(self) -> Tensor:
        return _halve(self.x, torch.minimum)

    @cached_property
    def extreme(self) -> Tensor:
        """The value of the largest magnitude, with its sign."""
        return torch.where(-self.low > self.high, self.low, self.high)

    @cached_property
    def count(self) -> Tensor:
        """The sum of the weights, (runs, rows) or (runs, 1)."""
        if self.w is None:
            return torch.full_like(self.x[:, 0, :1], self.x.shape[1])
        return fold(self.w)

    @cached_property
    def sum(self) -> Tensor:
        """The weighted sum of the values."""
        return self.total(self.x)


def _halve(values: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = choose(values[:, :half], values[:, half:])
    return values[:, 0]
