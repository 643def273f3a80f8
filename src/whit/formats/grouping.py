"""Columns that share parameters: views that let a matrix and its per-group params broadcast.

Group g of a row holds columns [g * group_size, (g + 1) * group_size); group_size 0 is the whole row. The last
group of a row may be shorter than the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW = 0


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of `columns`."""
    return 1 if group_size == ROW else max(-(-columns // group_size), 1)


def to_groups(matrix: Tensor, group_size: int) -> Tensor:
    """(rows, columns) to (rows, groups, group_size); a short last group repeats its own last column."""
    rows, columns = matrix.shape
    if group_size == ROW:
        return matrix.unsqueeze(1)
    if missing := -columns % group_size:
        matrix = torch.cat([matrix, matrix[:, -1:].expand(rows, missing)], dim=1)
    return matrix.reshape(rows, -1, group_size)


def group_sums(values: Tensor, group_size: int) -> Tensor:
    """(rows, columns) to sums (rows, groups); a short last group counts only what it has."""
    rows, columns = values.shape
    if group_size == ROW:
        return values.sum(dim=1, keepdim=True)
    if missing := -columns % group_size:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.reshape(rows, -1, group_size).sum(dim=-1)


def scale_sums(values: Tensor, group_size: int, per_tensor: bool) -> Tensor:
    """`group_sums` or, where one scale serves the whole tensor, the sum of everything (1, 1)."""
    sums = group_sums(values, group_size)
    return sums.sum().reshape(1, 1) if per_tensor else sums


def align(values: Tensor, params: tuple[Tensor, ...], column: int, group_size: int) -> tuple[Tensor, ...]:
    """`values` (rows, n), whose first column is `column` of the matrix, and params (rows, groups), made to broadcast.

    The first result is a view of `values` (reshape what you compute from it back to (rows, n)).
    """
    rows, count = values.shape
    if group_size == ROW:
        return (values, *params)
    if column % group_size == 0 and count % group_size == 0 and count:
        first, last = column // group_size, (column + count) // group_size
        return (values.reshape(rows, -1, group_size), *(p[:, first:last, None] for p in params))
    group = column // group_size
    if count and (column + count - 1) // group_size == group:  # a view: column by column, a gather would cost more
        return (values, *(p[:, group : group + 1] for p in params))
    index = torch.arange(column, column + count, device=values.device) // group_size
    return (values, *(p[:, index] for p in params))
