"""Round to nearest after clipping: the range of each group that gives the least weighted squared error.

For every group the params of the weights shrunk by beta are tried, beta = 1, 0.975, ..., 0.1, and the one kept
that minimises sum_j h_j (w_j - w^_j)^2. h is the diagonal of the hessian where there is one, otherwise 1. Formats
whose own fit is such a search (ggml's) are given h and left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.methods.rows import select, solve_by_rows
from whit.tensor import Format, LayerStats, Params, QuantizedTensor


@dataclass(frozen=True)
class Clip:
    """Clipped round to nearest; `steps` shrinking factors down to `smallest` are tried."""

    steps: int = 37
    smallest: float = 0.1

    name: ClassVar[str] = "clip"
    needs_stats: ClassVar[bool] = False
    needs_exact: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        importance = None if stats is None else stats.hessian.diagonal()

        def solve(rows: Tensor, format: Format) -> tuple[Tensor, Params]:
            params = self.search(rows, format, importance)
            return format.encode(rows, params), params

        return solve_by_rows(solve, weight, format)

    def search(self, weight: Tensor, format: Format, importance: Tensor | None) -> Params:
        """The unsealed params with the least weighted squared error."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if format.searches:
            return format.fit(weight, importance)
        best = format.fit(weight)
        least = _error(weight, format, best, importance)
        for beta in torch.linspace(1, self.smallest, self.steps, dtype=torch.float64).tolist()[1:]:
            params = format.fit(weight * beta)
            error = _error(weight, format, params, importance)
            better = error < least
            best, least = select(better, params, best), torch.where(better, error, least)
        return best


def _error(weight: Tensor, format: Format, params: Params, importance: Tensor | None) -> Tensor:
    error = (weight - format.decode(format.encode(weight, params), params)).square_()
    return format.sums(error if importance is None else error * importance)
