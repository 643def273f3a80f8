"""Small floats: bf16 as it is, and FP8 E4M3 with one float32 scale per row (or per tensor), S = max|x| / 448.

A code is the number's bit pattern, so that decode is a reinterpretation and a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.grouping import ROW
from whit.formats.numeric import compute_dtype, constant
from whit.tensor import Params, ParamSpec, tensor_param

E4M3_MAX = 448.0


@dataclass(frozen=True)
class BFloat16:
    """16-bit brain floats: no params; as a recipe's format it means that a tensor is kept."""

    bits = 16
    group_size = ROW
    vector_size = 1
    searches = False
    row_independent = True
    code_min = -(1 << 15)
    code_dtype = torch.int16
    continuous: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "bf16"

    @classmethod
    def parse(cls, spec: str) -> BFloat16 | None:
        return cls() if spec == "bf16" else None

    def sums(self, values: Tensor) -> Tensor:
        return values.sum(dim=1, keepdim=True)

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        return {}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        return {}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        return params

    def seal(self, params: Params) -> Params:
        return params

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        return weight.to(torch.bfloat16).contiguous().view(torch.int16)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        return codes.contiguous().view(torch.bfloat16).to(torch.float32)


@dataclass(frozen=True)
class Float8:
    """FP8 E4M3 (no infinities, largest 448) times one scale per row or, with `per_tensor`, one for the matrix."""

    per_tensor: bool = False

    bits = 8
    group_size = ROW
    vector_size = 1
    searches = False
    code_min = 0
    code_dtype = torch.uint8
    product_dtype = torch.float8_e4m3fn

    def __str__(self) -> str:
        return "fp8-tensor" if self.per_tensor else "fp8"

    @classmethod
    def parse(cls, spec: str) -> Float8 | None:
        return cls(spec == "fp8-tensor") if spec in ("fp8", "fp8-channel", "fp8-tensor") else None

    @property
    def continuous(self) -> tuple[str, ...]:
        return ("scale",)

    @property
    def row_independent(self) -> bool:
        return not self.per_tensor

    def row_scale(self, params: Params) -> Tensor:
        return tensor_param(params, "scale")

    def sums(self, values: Tensor) -> Tensor:
        sums = values.sum(dim=1, keepdim=True)
        return sums.sum(dim=0, keepdim=True) if self.per_tensor else sums

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        return {"scale": ParamSpec((1 if self.per_tensor else rows, 1), torch.float32, 32)}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        absmax = weight.to(compute_dtype(weight)).abs().amax(dim=1, keepdim=True)
        absmax = absmax.amax(dim=0, keepdim=True) if self.per_tensor else absmax
        most = constant((E4M3_MAX,), absmax.dtype, absmax.device)  # a GPU multiplies by the reciprocal of a number
        scale = (absmax / most).to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        return {"scale": torch.where(absmax == 0, 1.0, scale)}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        if "scale" not in free:
            return params
        levels = codes.view(torch.float8_e4m3fn).to(torch.float32)  # S = <w, l> / <l, l>
        best = self.sums(weight * levels) / self.sums(levels * levels).clamp(min=1e-38)
        return {"scale": torch.where(best > 0, best.to(torch.float32), tensor_param(params, "scale"))}

    def seal(self, params: Params) -> Params:
        return params

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        dtype = compute_dtype(weight)
        values = weight.to(dtype) / tensor_param(params, "scale").to(dtype)
        return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        return codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32) * tensor_param(params, "scale")
