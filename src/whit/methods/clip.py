"""Round to nearest after clipping: the range of each group that gives the least weighted squared error.

For every group the params of the weights shrunk by beta are tried, beta = 1, 0.975, ..., 0.1, and the one kept
that minimises the squared error sum_j (w_j - w^_j)^2. Where there is a hessian it is the error of the outputs that the
group is to blame for, d H_g d^T with d = w - w^ and H_g the group's block of the hessian (AWQ, Lin et al. 2023,
section 3.2, on H in place of stored activations); groups wider than 128 columns are summed in pieces. Formats whose
own fit is such a search (ggml's) are given the diagonal of H and left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from whit.methods.rows import select, solve_by_rows
from whit.named import INF, check_options
from whit.tensor import Format, LayerStats, Params, QuantizedTensor

WIDEST = 128  # columns of a hessian's block


@dataclass(frozen=True)
class Clip:
    """Round to nearest in a narrower range: of `steps` ranges, from the whole one down to `smallest` of it, each group
    of columns keeps the one with the least squared error. Needs no data; given statistics it weighs errors by them.

    RecipeError for options that are out of their bounds.
    """

    steps: int = 37
    smallest: float = 0.1

    name: ClassVar[str] = "clip"
    needs_stats: ClassVar[bool] = False
    needs_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, steps=(1, INF), smallest=(0, 1))

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        return self.weighted(weight, None if stats is None else _blocks(stats.hessian, format.group_size), format)

    def weighted(self, weight: Tensor, importance: Tensor | None, format: Format) -> QuantizedTensor:
        """Quantize (rows, columns) with `importance` as in `search`."""

        def solve(rows: Tensor, format: Format) -> tuple[Tensor, Params]:
            params = self.search(rows, format, importance)
            return format.encode(rows, params), params

        return solve_by_rows(solve, weight, format)

    def search(self, weight: Tensor, format: Format, importance: Tensor | None) -> Params:
        """The unsealed params with the least error for a matrix (rows, columns).

        `importance` (columns,) weighs squared errors; (blocks, size, size), blocks of a hessian that cover the columns,
        gives the error of outputs; None weighs all columns alike.
        """
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if format.searches:
            return format.fit(weight, _diagonal(importance))
        best = format.fit(weight)
        least = _error(weight, format, best, importance)
        for beta in torch.linspace(1, self.smallest, self.steps, dtype=torch.float64).tolist()[1:]:
            params = format.fit(weight * beta)
            error = _error(weight, format, params, importance)
            better = error < least
            best, least = select(better, params, best), torch.where(better, error, least)
        return best


def _error(weight: Tensor, format: Format, params: Params, importance: Tensor | None) -> Tensor:
    error = weight - format.decode(format.encode(weight, params), params)
    if importance is None:
        return format.sums(error.square_())
    if importance.dim() == 1:
        return format.sums(error.square_() * importance)
    parts = error.reshape(len(error), len(importance), -1).transpose(0, 1)
    return format.sums((parts @ importance).transpose(0, 1).reshape(error.shape) * error)


def _diagonal(importance: Tensor | None) -> Tensor | None:
    """The weight of each column's squared error."""
    if importance is None or importance.dim() == 1:
        return importance
    return importance.diagonal(dim1=1, dim2=2).flatten()


def _blocks(hessian: Tensor, group_size: int) -> Tensor:
    """What lies on the diagonal of a hessian (columns, columns), one block for each group: (blocks, size, size)."""
    columns = len(hessian)
    size = gcd(group_size or columns, columns)
    size = next(n for n in range(min(size, WIDEST), 0, -1) if size % n == 0)
    return torch.stack([hessian[i : i + size, i : i + size] for i in range(0, columns, size)])
