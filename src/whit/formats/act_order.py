"""Integers whose groups are columns of like activation, not neighbours: GPTQ's act-order (`desc_act`, `g_idx`).

x^[n, k] = S[n, g] (q[n, k] - Z[n, g]),  g = group[k]. Columns stay where they are; `group` int16 (1, columns) says
whose params each has, the same for all rows. Groups are filled by decreasing importance, or else by the columns' mean
squares, so that the columns that matter most share params with each other alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whit.capabilities import rounded
from whit.errors import FormatError
from whit.formats.affine import Affine
from whit.tensor import Params, ParamSpec, tensor_param

SUFFIX = "-act"
SHRINKS = 19  # ranges that a fit tries, from the whole one down to SMALLEST of it
SMALLEST = 0.55
MOST_GROUPS = (1 << 15) - 1


@dataclass(frozen=True)
class ActOrder:
    """`integers` are what the codes are, with the number of columns that share params."""

    integers: Affine

    vector_size = 1
    group_size = 0  # no columns share params because they are neighbours
    searches = True
    row_independent = False  # rows share their groups
    continuous: tuple[str, ...] = ()  # its fit is a search, and others move by groups of neighbours
    learned = ("scale",)

    def __post_init__(self) -> None:
        if not self.integers.group_size or self.integers.float_zero:
            raise FormatError(
                f"{self.integers}{SUFFIX}: act-order needs groups, and integer zero points if any; write int4-g128-act"
            )

    def __str__(self) -> str:
        return f"{self.integers}{SUFFIX}"

    @classmethod
    def parse(cls, spec: str) -> ActOrder | None:
        """`int4-g128-act`, `int4-g128-asym-f16-act` and their like; None for other families."""
        integers = Affine.parse(spec.removesuffix(SUFFIX)) if spec.endswith(SUFFIX) else None
        return None if integers is None else cls(integers)

    @property
    def bits(self) -> int:
        return self.integers.bits

    @property
    def rounded(self) -> tuple[str, ...]:
        return rounded(self.integers)

    @property
    def code_min(self) -> int:
        return self.integers.code_min

    @property
    def code_dtype(self) -> torch.dtype:
        return self.integers.code_dtype

    def sums(self, values: Tensor) -> Tensor:
        return values.sum(dim=1, keepdim=True)

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        return {**self.integers.param_specs(rows, columns), "group": ParamSpec((1, columns), torch.int16, 16)}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        columns = weight.shape[1]
        if -(-columns // self.integers.group_size) > MOST_GROUPS:
            raise FormatError(f"{self}: {columns} columns; {MOST_GROUPS} groups are the most; use larger groups")
        size = weight.to(torch.float64).square().mean(dim=0) if importance is None else importance
        order = size.argsort(descending=True, stable=True)
        group = torch.empty(1, columns, dtype=torch.int16, device=weight.device)
        group[0, order] = (torch.arange(columns, device=weight.device) // self.integers.group_size).to(torch.int16)
        weights = None if importance is None else importance[order]
        return {**_least(weight[:, order], self.integers, weights), "group": group}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        return dict(params)

    def seal(self, params: Params) -> Params:
        return params

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        return self._single.encode(weight, _of_columns(params, column, weight.shape[1]))

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        return self._single.decode(codes, _of_columns(params, column, codes.shape[1]))

    @property
    def _single(self) -> Affine:
        """The same integers with params for each column."""
        return replace(self.integers, group_size=1)


def _of_columns(params: Params, first: int, count: int) -> dict[str, Tensor]:
    """The params of each of some columns (rows, count)."""
    group = tensor_param(params, "group")[0, first : first + count].long()
    return {name: tensor_param(params, name)[:, group] for name in params if name != "group"}


def _least(weight: Tensor, format: Affine, importance: Tensor | None) -> dict[str, Tensor]:
    """For each group the params of the shrunk weights that lose least in squares, weighed by `importance`."""
    best: dict[str, Tensor] = {}
    least = None
    for beta in torch.linspace(1, SMALLEST, SHRINKS, dtype=torch.float64).tolist():
        params = {name: tensor_param(found, name) for found in (format.fit(weight * beta),) for name in found}
        error = (weight - format.decode(format.encode(weight, params), params)).square()
        lost = format.sums(error if importance is None else error * importance)
        if least is None:
            best, least = params, lost
            continue
        better = lost < least
        best = {name: torch.where(better, params[name], best[name]) for name in best}
        least = torch.where(better, lost, least)
    return best
