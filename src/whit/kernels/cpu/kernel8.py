"""Products of 8-bit activations on the processor: int8 per token with int8 weights, and per 32 columns with any codes.

Levels of codebooks are rounded to bytes first (`activated.product_format`). In three cases the rounded activations are
multiplied as in `Cpu`:

- formats that are not bytes even then: more than 16 levels that are not integers, or groups of columns that are not
  multiples of 32;
- with AMX, whose tiles have one scale for a row, all formats from TILES_FROM rows of bfloat16 on;
- formats with exact columns, by their own levels.

Activations that came in bfloat16 are then rounded to it once more; otherwise products are exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from whit.capabilities import product_dtype, radix
from whit.kernels import int8
from whit.kernels.activated import product_format, rounded_floats
from whit.kernels.cpu.binding import library
from whit.kernels.cpu.kernel import FLOATS, Cpu, compiled_library
from whit.kernels.cpu.rows8 import ROW_SUMS, Rows8, levels_of, linear, multiply, padded, quantize_rows, round_groups
from whit.kernels.cpu.weight import CpuWeight, plan_weight, unsupported
from whit.layouts import BITS
from whit.tensor import PackedWeight

TILES_FROM = 64  # rows of bfloat16


@dataclass(frozen=True)
class Cpu8:
    """What `packed.activations` says, in int8: the same integers as kernels/int8.py, and the same rounding.

    `isa` is one of binding.ISAS8; None takes the best that the processor has.
    """

    isa: str | None = None
    name: ClassVar[str] = "cpu-int8"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        how, compiled = packed.activations, library()
        if how is None:
            return "activations are not quantized"
        if x.device.type != "cpu" or packed.device.type != "cpu":
            return f"activations are on {x.device.type}, the weight is on {packed.device.type}"
        if x.dtype not in FLOATS or how.dtype != torch.int8:
            return f"activations are {x.dtype}, to be multiplied as {how.dtype}"
        if isinstance(compiled, str):
            return compiled
        if self.isa is not None and self.isa not in compiled.isas8:
            return f"this processor does not run {self.isa}, or the compiler did not build it"
        if how.granularity != "group" and product_dtype(packed.format) != torch.int8:
            return f"{packed.format} is not made of int8"
        if reason := unsupported(packed):
            return reason
        levels = levels_of(packed.format)
        return levels if how.granularity != "group" and isinstance(levels, str) else None

    def prepare(self, packed: PackedWeight) -> CpuWeight:
        return packed if isinstance(packed, CpuWeight) else _planned(packed, move=True)

    def restore(self, packed: PackedWeight) -> CpuWeight:
        """The weight around tensors that `prepare` made before, derived ones among them: nothing is moved or made."""
        return plan_weight(packed, compiled_library(), move=False)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        weight = packed if isinstance(packed, CpuWeight) else _planned(packed, move=False)
        if x.dim() != 2 or not x.is_contiguous():
            y = self._product(x.reshape(-1, weight.shape[1]).contiguous(), weight, bias)
            return y.reshape(*x.shape[:-1], weight.shape[0])
        return self._product(x, weight, bias)

    def _product(self, x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
        """The product of x (count, in_features), contiguous."""
        if not len(x):
            return x.new_empty(0, weight.shape[0])
        how, bias = weight.activations, None if bias is None else bias.contiguous()
        assert how is not None
        if how.exact:
            y = Cpu().linear(rounded_floats(x, weight), weight, None if bias is None else bias.to(torch.float32))
            return y.to(x.dtype)
        levels = levels_of(format := product_format(weight))
        if isinstance(levels, str) or self._by_tiles(x, weight):  # dynamic8
            rounded = round_groups(x, x.dtype if x.dtype == torch.bfloat16 else torch.float32, compiled_library())
            if format is not weight.format:
                weight = plan_weight(replace(weight, format=format), compiled_library(), move=False)
            bias = None if bias is None else bias.to(rounded.dtype)
            return Cpu().product(rounded, weight, bias, folds=True).to(x.dtype)
        if how.threshold > 0:
            return self._with_outliers(x, weight, bias, how.threshold)
        if how.kind == "dynamic" and how.symmetric and how.granularity != "tensor":
            return linear(x, how.granularity == "group", weight, levels, bias, compiled_library(), self.isa)
        return multiply(_rows(x, weight), weight, bias, x.dtype, compiled_library(), self.isa)

    def _by_tiles(self, x: Tensor, weight: CpuWeight) -> bool:
        """Whether groups of 32 columns are faster as bfloat16, once they are rounded: by AMX."""
        compiled, how = compiled_library(), weight.activations
        if how is None or how.granularity != "group" or x.dtype != torch.bfloat16 or len(x) < TILES_FROM:
            return False
        if radix(weight.format):  # their codes are digits of bytes
            return False
        return (self.isa or compiled.isas8[-1]) == "amx" and "amx" in compiled.isas_many

    def _with_outliers(self, x: Tensor, weight: CpuWeight, bias: Tensor | None, threshold: float) -> Tensor:
        """int8.outlier_linear, whose exact part has only the columns that hold an outlier."""
        compiled = compiled_library()
        (columns,) = int8.outlier_columns(x, threshold).nonzero(as_tuple=True)
        if not len(columns):
            return multiply(quantize_rows(x, False, compiled, self.isa), weight, bias, x.dtype, compiled, self.isa)
        within = x.index_fill(1, columns, 0)
        y = multiply(quantize_rows(within, False, compiled, self.isa), weight, None, torch.float32, compiled, self.isa)
        params = {key: weight.tensors[key] for key in weight.format.param_specs(*weight.shape)}
        scale: Tensor = weight.format.row_scale(params)  # type: ignore[attr-defined]
        codes = BITS.unpack(weight).codes[:, columns].to(torch.float32)
        exact = torch.nn.functional.linear(x[:, columns], (codes * scale).to(x.dtype))
        y += exact.to(torch.float32)
        return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def _rows(x: Tensor, weight: CpuWeight) -> Rows8:
    """Rows by one scale for all, static ones, or with zero points."""
    how = weight.activations
    assert how is not None
    if how.kind == "static":
        rows = int8.quantize_static(x, weight.tensors["input_scale"], weight.tensors.get("input_zero_point"))
    else:
        rows = int8.quantize_rows(x, how.granularity == "tensor", how.symmetric)
    one = (len(x), 1)
    zero = None if rows.zero_point is None else rows.zero_point.expand(one).contiguous()
    codes = pad(rows.codes, (0, padded(x.shape[1]) - x.shape[1]))
    sums = rows.codes.sum(1, keepdim=True, dtype=torch.int32)
    return Rows8(codes.contiguous(), rows.scale.expand(one).contiguous(), sums, zero)


def _planned(packed: PackedWeight, move: bool) -> CpuWeight:
    weight = plan_weight(packed, compiled_library(), move)
    how = packed.activations
    if how is None or (how.symmetric and "input_zero_point" not in weight.tensors):
        return weight
    sums = BITS.unpack(packed).codes.sum(1, dtype=torch.int32)
    return replace(weight, tensors={**weight.tensors, ROW_SUMS: sums})
