"""A format with a side-car: w = base's w + B A, with B (out, rank) and A (rank, in) in bfloat16 for each matrix.

`int2-g32+r16` is int2-g32 and a product of rank 16 that makes up for a part of what the two bits lose (LQER, Zhang et
al. 2024). Codes and params are the base's; `low_rank_a` and `low_rank_b` lie beside them. Methods see the base alone:
`methods.lowrank` chooses the product for what they leave.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.capabilities import rotation
from whit.errors import FormatError
from whit.formats.around import Around
from whit.formats.factors import best_factors
from whit.tensor import Format, PackedWeight, Params, ParamSpec, QuantizedTensor, tensor_param

A, B = "low_rank_a", "low_rank_b"
DTYPE = torch.bfloat16
PATTERN = re.compile(r"(?P<base>.+)\+r(?P<rank>[1-9]\d{0,4})")


@dataclass(frozen=True)
class LowRank(Around):
    """`base` with a side-car of `rank`."""

    base: Format
    rank: int

    row_independent = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.base.bits == 16 or side_car(self.base) is not None:
            raise FormatError(f"{self}: a side-car of rank 1 or more goes beside a format of up to 8 bits; write one")
        if rotation(self.base):
            raise FormatError(
                f"{self}: a side-car beside rotated codes; it goes beside plain ones; choose one of the two"
            )

    def __str__(self) -> str:
        return f"{self.base}+r{self.rank}"

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        bits = 8 * DTYPE.itemsize
        a, b = ParamSpec((self.rank, columns), DTYPE, bits), ParamSpec((rows, self.rank), DTYPE, bits)
        return {**self.base.param_specs(rows, columns), A: a, B: b}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        """The base's params, and the best product for what rounding with them leaves."""
        params = self.base.seal(self.base.fit(weight, importance))
        near = self.base.decode(self.base.encode(weight, params), params)
        return self.join(params, *best_factors(weight - near, None, self.rank))

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        base = self.base.refit(weight - product(params).to(weight.dtype), codes, self.inner(params), free)
        return {**base, A: params[A], B: params[B]}

    def seal(self, params: Params) -> Params:
        return {**self.base.seal(self.inner(params)), A: params[A], B: params[B]}

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        beside = product(params, column, weight.shape[1]).to(weight.dtype)
        return self.base.encode(weight - beside, self.inner(params), column)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        return self.base.decode(codes, self.inner(params), column) + product(params, column, codes.shape[1])

    def inner(self, params: Params) -> dict[str, Tensor | QuantizedTensor]:
        """The params of the base alone."""
        return {name: value for name, value in params.items() if name not in (A, B)}

    def join(self, params: Params, b: Tensor, a: Tensor) -> Params:
        """The base's params with the factors beside them, rounded as they are stored."""
        return {**params, A: a.to(DTYPE), B: b.to(DTYPE)}


def product(params: Params, column: int = 0, count: int | None = None) -> Tensor:
    """B A in float32, or `count` columns of it from `column` on.

    Summed in float64, in which products of bfloat16 hardly ever round: pieces are the whole's, bit for bit.
    """
    a, b = tensor_param(params, A).to(torch.float64), tensor_param(params, B).to(torch.float64)
    return (b @ (a if count is None else a[:, column : column + count])).to(torch.float32)


def side_car(format: Format) -> LowRank | None:
    """The format as one with a side-car, None where it has none."""
    return format if isinstance(format, LowRank) else None


def without_side_car(format: Format) -> Format:
    """The format of the codes alone."""
    found = side_car(format)
    return format if found is None else found.base


def split(packed: PackedWeight) -> tuple[PackedWeight, Tensor, Tensor] | None:
    """A packed weight without its side-car, and B and A; None where there is no side-car."""
    found = side_car(packed.format)
    if found is None:
        return None
    codes = {name: tensor for name, tensor in packed.tensors.items() if name not in (A, B)}
    return PackedWeight(packed.layout, found.base, packed.shape, codes), packed.tensors[B], packed.tensors[A]


def refuse_shape(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a matrix of that shape can have no such side-car, in a clause; None where it can, or there is none."""
    found = side_car(format)
    if found is None:
        return None
    if len(shape) != 2:
        return f"shape {list(shape)}; a side-car goes beside a linear's matrix; use {found.base}"
    if found.rank >= min(shape):
        return f"shape {list(shape)}; a side-car's rank must be below both; use a smaller one than {found.rank}"
    return None
