"""ggml's types as formats: k-quants, their simple ancestors, IQ4, ternary and MXFP4, bit for bit as ggml decodes them.

    w = (d scale) level[code] - (dmin min),   products and difference in float32, in this order

Params: `d` (float16), with `m` (float16) in q4_1 and q5_1; superblock types have `scale` per run of columns, unsigned
with `Kind.scale_bias` added, and with minima also `dmin` (float16) and `min`. MXFP4 has `exponent` (E8M0) alone.
What `fit` finds is the least (weighted) squared error that a search gives: see `fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from whit.formats.ggml.fit import exponent_scale, fit_groups
from whit.formats.ggml.kinds import KINDS, Kind
from whit.formats.ggml.levels import nearest
from whit.formats.grouping import align, group_count, group_sums
from whit.formats.numeric import constant
from whit.tensor import Params, ParamSpec, tensor_param

TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Ggml:
    """One of ggml's types, by its name in lower case (`q4_k`)."""

    name: str

    vector_size = 1
    row_independent = True
    searches = True

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, spec: str) -> Ggml | None:
        """`q4_k`, `q8_0`, `iq4_xs` and their like; None for other families."""
        return cls(spec) if spec in KINDS else None

    @cached_property
    def kind(self) -> Kind:
        """The facts of the type."""
        return KINDS[self.name]

    @property
    def bits(self) -> int:
        return self.kind.bits

    @property
    def group_size(self) -> int:
        return self.kind.group_size

    @property
    def code_min(self) -> int:
        return self.kind.low

    @property
    def code_max(self) -> int:
        return len(self.kind.levels) - 1 if self.kind.levels else self.kind.high

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.kind.low < 0 else torch.uint8

    @property
    def continuous(self) -> tuple[str, ...]:
        if self.kind.exponent:
            return ()
        return ("d", *{"m": ("m",), "min": ("dmin",)}.get(self.kind.offset, ()))

    @property
    def rounded(self) -> tuple[str, ...]:
        """The sub-scales and sub-minima of superblocks."""
        if not self.kind.scale_bits:
            return ()
        return ("scale", "min") if self.kind.offset else ("scale",)

    @property
    def run_size(self) -> int:
        """Neighbouring columns that share an effective scale (and offset)."""
        return self.kind.sub_size

    @property
    def integer_levels(self) -> tuple[int, ...]:
        """The integers that stored codes, from 0 upwards, mean."""
        return self.kind.levels or tuple(range(self.kind.low, self.kind.low + (1 << self.kind.bits)))

    @property
    def scale_bias(self) -> int:
        """What was added to the integer sub-scales as they are stored."""
        return self.kind.scale_bias

    def sums(self, values: Tensor) -> Tensor:
        return group_sums(values, self.group_size)

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        kind, groups = self.kind, group_count(columns, self.group_size)
        if kind.exponent:
            return {"exponent": ParamSpec((rows, groups), torch.uint8, 8)}
        specs = {name: ParamSpec((rows, groups), torch.float16, 16) for name in self.continuous}
        if kind.scale_bits:
            part = ParamSpec((rows, groups * kind.subs), torch.uint8, kind.scale_bits)
            specs["scale"] = part
            if kind.offset:
                specs["min"] = part
        return specs

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        return fit_groups(weight, importance, self.kind, self.name)

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        free = tuple(name for name in free if name in self.continuous)
        if not free:
            return params
        new = {name: tensor_param(params, name) for name in params}
        basis = {name: self._basis(codes, new, name) for name in self.continuous}
        held = [basis[n] * _wide(new[n], self.group_size, codes.shape[1]) for n in self.continuous if n not in free]
        target = weight.to(torch.float32) - sum(held) if held else weight.to(torch.float32)
        solved = _least_squares([basis[name] for name in free], target, self.group_size)
        for name, value in zip(free, solved, strict=True):
            stored = value.to(torch.float16)
            fits = torch.isfinite(stored) & (((stored > 0) == (new[name] > 0)) | (name == "m"))
            new[name] = torch.where(fits, stored, new[name])
        return new

    def seal(self, params: Params) -> Params:
        return params

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        scale, offset = self._effective(params, column, weight.shape[1])
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale).clamp_(-LARGEST, LARGEST)
        parts = (inverse,) if offset is None else (inverse, offset)
        values, *aligned = align(weight.to(torch.float32), parts, column % self.kind.sub_size, self.kind.sub_size)
        steps = values * aligned[0] if offset is None else (values + aligned[1]) * aligned[0]
        return nearest(steps, self.kind).to(self.code_dtype).reshape(weight.shape)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        scale, offset = self._effective(params, column, codes.shape[1])
        parts = (scale,) if offset is None else (scale, offset)
        values, *aligned = align(self._levels(codes), parts, column % self.kind.sub_size, self.kind.sub_size)
        product = values * aligned[0]
        return (product if offset is None else product - aligned[1]).reshape(codes.shape)

    def _levels(self, codes: Tensor) -> Tensor:
        """The integers that codes mean, in float32."""
        if not self.kind.levels:
            return codes.to(torch.float32)
        return constant(self.kind.levels, torch.float32, codes.device)[codes.int()]

    def _effective(self, params: Params, column: int, count: int) -> tuple[Tensor, Tensor | None]:
        """d scale and dmin min in float32, for the runs that hold columns [column, column + count)."""
        kind = self.kind
        first, last = column // kind.sub_size, (column + max(count, 1) - 1) // kind.sub_size + 1
        if kind.exponent:
            return exponent_scale(tensor_param(params, "exponent")[:, first:last]), None

        def spread(name: str, bias: int) -> Tensor:
            outer = tensor_param(params, name)
            integers = tensor_param(params, {"d": "scale", "dmin": "min"}[name])[:, first:last]
            groups = torch.arange(first, last, device=outer.device) // kind.subs
            return outer.to(torch.float32)[:, groups] * (integers.to(torch.float32) - bias)

        if kind.scale_bits:
            return spread("d", kind.scale_bias), spread("dmin", 0) if kind.offset else None
        scale = tensor_param(params, "d")[:, first:last].to(torch.float32)
        return scale, -tensor_param(params, "m")[:, first:last].to(torch.float32) if kind.offset else None

    def _basis(self, codes: Tensor, params: Params, name: str) -> Tensor:
        """What the decoded weights are made of per unit of one float16 param (rows, columns)."""
        unit = {n: torch.zeros_like(tensor_param(params, n)) for n in self.continuous}
        unit[name] = torch.ones_like(unit[name])
        return self.decode(codes, {**params, **unit})


def _wide(value: Tensor, group_size: int, columns: int) -> Tensor:
    return value.to(torch.float32).repeat_interleave(group_size, dim=1)[:, :columns]


def _least_squares(basis: list[Tensor], target: Tensor, group_size: int) -> list[Tensor]:
    """Per group the coefficients (rows, groups) of one or two basis matrices that come nearest to the target."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return group_sums(a.to(torch.float64) * b, group_size)

    if len(basis) == 1:
        return [dot(basis[0], target) / dot(basis[0], basis[0]).clamp(min=TINY)]
    a, b = basis
    aa, ab, bb, at, bt = dot(a, a), dot(a, b), dot(b, b), dot(a, target), dot(b, target)
    determinant = aa * bb - ab * ab
    regular = determinant > 1e-9 * aa * bb
    safe = torch.where(regular, determinant, 1.0)
    nan = torch.full_like(safe, torch.nan)
    return [
        torch.where(regular, (bb * at - ab * bt) / safe, nan), torch.where(regular, (aa * bt - ab * at) / safe, nan)
    ]  # fmt: skip
