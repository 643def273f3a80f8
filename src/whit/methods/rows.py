"""Work on a matrix a few rows at a time, so that every intermediate stays in the processor's cache.

On a CPU the chunks are shared out, each done by one thread: the operations on a chunk are so short that waking a second
thread for each of them takes as long as they do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from whit.methods.stack import joined
from whit.methods.workers import Workers, workers
from whit.tensor import Format, Params, QuantizedTensor, tensor_param

CHUNK = 1 << 19  # elements; fixed, so that results do not depend on the machine

Solver = Callable[[Tensor, Format], tuple[Tensor, Params]]


def solve_by_rows(solve: Solver, weight: Tensor, format: Format) -> QuantizedTensor:
    """`solve(rows of weight, format) -> (codes, unsealed params)` over chunks of rows, joined and sealed."""
    rows, columns = weight.shape
    count = max(CHUNK // max(columns, 1), 1) if format.row_independent else max(rows, 1)
    starts = range(0, max(rows, 1), count)
    alone = len(starts) == 1 or torch.get_num_threads() == 1

    def part(first: int) -> tuple[Tensor, Params]:
        return solve(weight[first : first + count], format)

    with nullcontext(Workers(None)) if alone else workers(weight.device) as hands:
        codes, params = joined(hands.map(part, starts), rows)
    return QuantizedTensor(format, tuple(weight.shape), codes, format.seal(params))


def select(better: Tensor, new: Params, old: Params) -> Params:
    """For each set of shared params the new ones where `better` (in the shape of `Format.sums`), else the old ones."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        finer = old.shape[1] // better.shape[1]
        return torch.where(better if finer == 1 else better.repeat_interleave(finer, dim=1), new, old)

    return {name: choose(tensor_param(new, name), tensor_param(old, name)) for name in old}
