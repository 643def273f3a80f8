"""Affine integers with an offset instead of a zero point: x^ = S q + M, unsigned codes q. What MLX stores.

S and M are stored in one type. M is the least value of a group (never above 0) rounded down, S the smallest scale at
which no value moves by more than half a step, rounded up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats.grouping import ROW, align, group_count, group_sums, to_groups
from whit.formats.numeric import DTYPE_NAMES, check_fits, compute_dtype, round_up_to
from whit.formats.scaled import group_size_in
from whit.tensor import Params, ParamSpec, tensor_param

PATTERN = re.compile(r"int(?P<bits>[2-8])-(?P<where>channel|g[1-9]\d*)-offset(?:-(?P<dtype>f16|f32|bf16))?")


@dataclass(frozen=True)
class Offset:
    """Integers of 2 to 8 bits, per group of columns or per row (`group_size` 0)."""

    bits: int
    group_size: int = ROW
    scale_type: str = "bf16"

    vector_size = 1
    searches = False
    row_independent = True
    code_min = 0
    code_dtype = torch.uint8
    continuous: tuple[str, ...] = ("scale", "offset")

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.scale_type not in DTYPE_NAMES:
            raise FormatError(f"int{self.bits}-offset: 2 to 8 bits with scales of f16, bf16 or f32; choose those")

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{where}-offset" + ("" if self.scale_type == "bf16" else f"-{self.scale_type}")

    @classmethod
    def parse(cls, spec: str) -> Offset | None:
        """`int4-g64-offset-f16` and its like; None for other families."""
        if not (m := PATTERN.fullmatch(spec)):
            return None
        return cls(int(m["bits"]), group_size_in(m["where"]), m["dtype"] or "bf16")

    @property
    def code_max(self) -> int:
        return (1 << self.bits) - 1

    def sums(self, values: Tensor) -> Tensor:
        return group_sums(values, self.group_size)

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        dtype = DTYPE_NAMES[self.scale_type]
        spec = ParamSpec((rows, group_count(columns, self.group_size)), dtype, 8 * dtype.itemsize)
        return {"scale": spec, "offset": spec}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        dtype = DTYPE_NAMES[self.scale_type]
        low, high = torch.aminmax(to_groups(weight, self.group_size).to(compute_dtype(weight)), dim=-1)
        depth, high = (-low).clamp(min=0), high.clamp(min=0)
        check_fits(torch.maximum(depth, high), dtype, f"{self}: offset")
        depth = torch.where(depth > 0, round_up_to(depth.clamp(min=torch.finfo(torch.float32).tiny), dtype), 0)
        span = high + depth.to(high.dtype)
        check_fits(span / self.code_max, dtype, f"{self}: scale")
        scale = (span / self.code_max).clamp(min=torch.finfo(torch.float32).tiny)
        return {"scale": round_up_to(torch.where(span > 0, scale, 1.0), dtype), "offset": -depth}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        new = dict(params)
        values, q = weight.to(torch.float32), codes.to(torch.float32)
        scale, offset = tensor_param(params, "scale"), tensor_param(params, "offset")
        if "offset" in free:  # M = mean(w - S q)
            rest = values - self.decode(codes, {"scale": scale, "offset": torch.zeros_like(offset)})
            count = self.sums(torch.ones_like(values[:1]).expand_as(values))
            new["offset"] = offset = (self.sums(rest) / count).to(offset.dtype)
        if "scale" in free:  # S = <w - M, q> / <q, q>
            rest = values - self.decode(torch.zeros_like(codes), {"scale": scale, "offset": offset})
            best = self.sums(rest * q) / self.sums(q * q).clamp(min=1e-38)
            new["scale"] = torch.where(best > 0, best, scale.float()).to(scale.dtype)
        return new

    def seal(self, params: Params) -> Params:
        return params

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        values, scale, offset = self._align(weight.to(compute_dtype(weight)), params, column)
        steps = (values - offset.to(values.dtype)) / scale.to(values.dtype)
        return steps.round().clamp(0, self.code_max).to(torch.uint8).reshape(weight.shape)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        values, scale, offset = self._align(codes, params, column)
        return (values.to(torch.float32) * scale.float() + offset.float()).reshape(codes.shape)

    def _align(self, values: Tensor, params: Params, column: int) -> tuple[Tensor, ...]:
        return align(values, (tensor_param(params, "scale"), tensor_param(params, "offset")), column, self.group_size)
