"""Affine integers: Q(x) = clamp(round(x / S + Z)),  x^ = S (Q - Z).

Symmetric formats have signed codes and Z = 0 (one bit has the codes {0, 1} and Z = 1/2, that is +-S/2). Asymmetric
formats have unsigned codes and a zero point per group: an integer stored in `bits` bits, or a float16 (`-fz`).

The scale of a group is the smallest at which no value moves by more than half a step: symmetric
|S| = max|x| / (2^(bits-1) - 1/2), asymmetric S = (max(x, 0) - min(x, 0)) / (2^bits - 1), rounded up to the stored
type. Symmetric codes reach one step further down than up: S is negative where the largest value is positive, so that
clipping can spend that step on the longer side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats.grouping import ROW, align, to_groups
from whit.formats.numeric import DTYPE_NAMES, check_fits, compute_dtype, constant, round_up_to
from whit.formats.scaled import Scaled, group_size_in
from whit.tensor import Params, ParamSpec, tensor_param

PATTERN = re.compile(
    r"int(?P<bits>[1-8])(?:-(?P<where>tensor|channel|g[1-9]\d*))?(?P<asym>-asym)?(?P<fz>-fz)?(?:-(?P<dtype>f16|f32|bf16))?"
)
MAX_GROUP = 1 << 20


@dataclass(frozen=True)
class Affine(Scaled):
    """Integers of 1 to 8 bits: w = code scale, or, where not `symmetric`, w = (code - zero_point) scale.

    - `group_size`: columns that share params; 0: one scale per row, or, with `per_tensor`, one for the matrix.
    - `float_zero`: zero points are float16 and not integers (`-fz`); asymmetric formats only.
    - `scale_type`: bf16, f16 or f32; empty: what is usual, bf16 in groups and f32 otherwise.

    FormatError for what does not go together.
    """

    bits: int
    group_size: int = ROW
    symmetric: bool = True
    per_tensor: bool = False
    float_zero: bool = False
    scale_type: str = ""

    vector_size = 1
    searches = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise FormatError(f"int{self.bits}: {self.bits} bits; affine formats have 1 to 8; choose one of those")
        if not 0 <= self.group_size <= MAX_GROUP:
            raise FormatError(f"int{self.bits}: group_size {self.group_size}; it must be 0 (whole row) to {MAX_GROUP}")
        if self.float_zero and self.symmetric:
            raise FormatError(f"int{self.bits}-fz: a float zero point needs an asymmetric format; write -asym-fz")

    def __str__(self) -> str:
        kind = ("" if self.symmetric else "-asym") + ("-fz" if self.float_zero else "")
        scale = "" if self.scale_type == self.default_scale_type else f"-{self.scale_type}"
        return f"int{self.bits}-{self.where}{kind}{scale}"

    @classmethod
    def parse(cls, spec: str) -> Affine | None:
        """`int4-g128-asym` and its like; None for other families."""
        if not (m := PATTERN.fullmatch(spec)):
            return None
        size, whole = group_size_in(m["where"]), m["where"] == "tensor"
        return cls(int(m["bits"]), size, not m["asym"], whole, bool(m["fz"]), m["dtype"] or "")

    @property
    def signed(self) -> bool:
        return self.symmetric and self.bits > 1

    @property
    def code_min(self) -> int:
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def code_max(self) -> int:
        return self.code_min + (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    @property
    def continuous(self) -> tuple[str, ...]:
        return ("scale", "zero_point") if self.float_zero else ("scale",)

    @property
    def rounded(self) -> tuple[str, ...]:
        """The zero point, where it is an integer."""
        return () if self.symmetric or self.float_zero else ("zero_point",)

    @property
    def product_dtype(self) -> torch.dtype | None:
        return torch.int8 if self.signed and not self.group_size else None

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        shape = self.params_shape(rows, columns)
        specs = {"scale": self.scale_spec(rows, columns)}
        if self.float_zero:
            specs["zero_point"] = ParamSpec(shape, torch.float16, 16)
        elif not self.symmetric:
            specs["zero_point"] = ParamSpec(shape, torch.uint8, self.bits)
        return specs

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        groups = to_groups(weight, self.group_size).to(compute_dtype(weight))
        if self.per_tensor:
            groups = groups.reshape(1, 1, -1)
        low, high = torch.aminmax(groups, dim=-1)
        # A tensor: a GPU multiplies by the reciprocal of a number, which moves the largest value off its tie.
        steps = constant(((1 << self.bits) - 1,), groups.dtype, groups.device)
        if self.symmetric:
            absmax = torch.maximum(-low, high)
            scale = self._store_scale(absmax / (steps / 2), absmax == 0)
            # Codes reach one step further down than up: a negative scale gives that step to the longer side.
            return {"scale": torch.where(high > -low, -scale, scale) if self.signed else scale}
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = self._store_scale(high / steps - low / steps, high == low)
        return {"scale": scale, "zero_point": self._store_zero(-low / scale.to(low.dtype))}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        new = dict(params)
        if "zero_point" in free:  # w = S (q - Z)  =>  Z = mean(q - w / S)
            zero = self._mean(codes - self._divide(weight, tensor_param(params, "scale")))
            new["zero_point"] = self._store_zero(zero.clamp(self.code_min - self.code_max, 2 * self.code_max))
        if "scale" in free:  # S = <w, q - Z> / <q - Z, q - Z>
            steps = self._steps(codes, new, 0).reshape(weight.shape)
            best = self.sums(weight * steps) / self.sums(steps * steps).clamp(min=torch.finfo(steps.dtype).tiny)
            old = tensor_param(params, "scale").to(best.dtype)
            new["scale"] = torch.where(best * old > 0, best, old).to(tensor_param(params, "scale").dtype)
        return new

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        dtype = compute_dtype(weight)
        values, scale, *zero = self._align(weight.to(dtype), params, column)
        codes = values / scale.to(dtype)
        if self.bits == 1 and self.symmetric:
            codes += 0.5
        elif zero:
            codes += zero[0].to(dtype)
        codes = codes.round_().clamp_(self.code_min, self.code_max)
        return codes.to(self.code_dtype).reshape(weight.shape)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        scale = self._align(codes, {"scale": params["scale"]}, column)[1]
        return (self._steps(codes, params, column) * scale.to(torch.float32)).reshape(codes.shape)

    def _steps(self, codes: Tensor, params: Params, column: int) -> Tensor:
        """q - Z in float32, in the aligned view."""
        values, _, *zero = self._align(codes, params, column)
        steps = values.to(torch.float32)
        if self.bits == 1 and self.symmetric:
            return steps.sub_(0.5)
        return steps.sub_(zero[0].to(torch.float32)) if zero else steps

    def _align(self, values: Tensor, params: Params, column: int) -> tuple[Tensor, ...]:
        tensors = tuple(tensor_param(params, name) for name in ("scale", "zero_point") if name in params)
        return align(values, tensors, column, self.group_size)

    def _divide(self, weight: Tensor, scale: Tensor) -> Tensor:
        values, aligned = align(weight, (scale.to(weight.dtype),), 0, self.group_size)
        return (values / aligned).reshape(weight.shape)

    def _mean(self, values: Tensor) -> Tensor:
        return self.sums(values) / self.sums(torch.ones_like(values[:1]).expand_as(values))

    def _store_scale(self, scale: Tensor, is_zero: Tensor) -> Tensor:
        """`scale` rounded up to the stored type; 1 where the group holds only zeros."""
        dtype = DTYPE_NAMES[self.scale_type]
        check_fits(scale, dtype, f"{self}: scale")
        return round_up_to(torch.where(is_zero, 1.0, scale.clamp(min=torch.finfo(torch.float32).tiny)), dtype)

    def _store_zero(self, zero: Tensor) -> Tensor:
        if self.float_zero:
            return zero.to(torch.float16)
        return zero.round().clamp(0, self.code_max).to(torch.uint8)
