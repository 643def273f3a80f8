"""LLM.int8's weights (Dettmers et al. 2022): w = code absmax / 127, one float32 absmax per row, codes in [-127, 127].

The numbers of bitsandbytes' 8-bit linears. `int8` spans half a step more, and so errs a little less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.grouping import ROW
from whit.formats.numeric import compute_dtype
from whit.tensor import Params, ParamSpec, tensor_param

STEPS = 127.0


@dataclass(frozen=True)
class Absmax8:
    """`int8-absmax`."""

    bits = 8
    group_size = ROW
    vector_size = 1
    searches = False
    row_independent = True
    code_min = -128
    code_dtype = torch.int8
    continuous: tuple[str, ...] = ("absmax",)
    product_dtype = torch.int8

    def __str__(self) -> str:
        return "int8-absmax"

    @classmethod
    def parse(cls, spec: str) -> Absmax8 | None:
        return cls() if spec == "int8-absmax" else None

    def row_scale(self, params: Params) -> Tensor:
        return tensor_param(params, "absmax") * (1 / STEPS)

    def sums(self, values: Tensor) -> Tensor:
        return values.sum(dim=1, keepdim=True)

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        return {"absmax": ParamSpec((rows, 1), torch.float32, 32)}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        return {"absmax": weight.to(compute_dtype(weight)).abs().amax(dim=1, keepdim=True).to(torch.float32)}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        if "absmax" not in free:
            return params
        steps = codes.to(torch.float32) / STEPS  # absmax = <w, q / 127> / <q / 127, q / 127>
        best = self.sums(weight * steps) / self.sums(steps * steps).clamp(min=1e-38)
        return {"absmax": torch.where(best > 0, best.to(torch.float32), tensor_param(params, "absmax"))}

    def seal(self, params: Params) -> Params:
        return params

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        absmax = tensor_param(params, "absmax")
        factor = torch.where(absmax > 0, STEPS / absmax, 0.0)
        scaled = weight.to(compute_dtype(weight)) * factor
        return scaled.round().clamp(-STEPS, STEPS).to(torch.int8)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        return codes.to(torch.float32) * (tensor_param(params, "absmax") * (1 / STEPS))
