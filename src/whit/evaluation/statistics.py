"""Means with their uncertainty, from per-token figures that are correlated within a window.

Tokens of one window depend on each other, so the unit of resampling is a block of neighbouring tokens: the window
where there are at least 30, else equal consecutive parts of each window, so many that there are 30 blocks in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ENOUGH_BLOCKS = 30
_RESAMPLES = 2000


@dataclass(frozen=True)
class Blocks:
    """Sums and sizes of the blocks of a per-token figure, float64 [blocks] each."""

    sums: Tensor
    sizes: Tensor

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.sizes.sum())

    def standard_error(self) -> float | None:
        """Of the mean, blocks taken as independent (ratio estimator); None with a single block."""
        count = self.sums.numel()
        if count < 2:
            return None
        residuals = self.sums - self.mean * self.sizes
        return math.sqrt(float((residuals**2).sum()) * count / (count - 1)) / float(self.sizes.sum())

    def interval(self, seed: int) -> tuple[float, float]:
        """95 % block-bootstrap interval of the mean (percentile method, 2,000 resamples, the same for a seed)."""
        count = self.sums.numel()
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=_RESAMPLES)
        means = (draws @ self.sums.numpy()) / (draws @ self.sizes.numpy())
        low, high = np.quantile(means, (0.025, 0.975))
        return float(low), float(high)


def blocks(values: Tensor) -> Blocks:
    """Cut a per-token figure [windows, tokens] into blocks."""
    windows, tokens = values.shape
    parts = 1 if windows >= _ENOUGH_BLOCKS else min(tokens, -(-_ENOUGH_BLOCKS // windows))
    pieces = values.double().tensor_split(parts, dim=1)
    sums = torch.cat([piece.sum(dim=1) for piece in pieces])
    sizes = torch.cat([torch.full((windows,), piece.shape[1], dtype=torch.float64) for piece in pieces])
    return Blocks(sums, sizes)


def percentile(values: Tensor, q: float) -> float:
    """The q-th percentile (0..100) over all tokens; numpy's, because torch.quantile refuses long inputs."""
    return float(np.percentile(values.numpy(), q))


def proportion(hits: list[bool]) -> tuple[float, float | None]:
    """Mean and standard error (sample deviation / sqrt(n), as in lm-evaluation-harness) of yes/no outcomes."""
    count = len(hits)
    mean = sum(hits) / count
    return mean, math.sqrt(mean * (1.0 - mean) / (count - 1)) if count > 1 else None
