"""The dispatch table's row for FP8 activations on Hopper: rows quantized in one launch, torch's product after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.capabilities import product_dtype
from whit.kernels import float8
from whit.kernels.gpu import int8_rows
from whit.kernels.gpu.kernel8 import ROW_SCALE, row_scale, unaligned, why_not_hopper
from whit.layouts import BITS
from whit.tensor import PackedWeight


@dataclass(frozen=True)
class GpuFloat8:
    """E4M3 activations quantized per row while the model runs, in bfloat16, on Hopper."""

    name: ClassVar[str] = "gpu-fp8"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        how, reason = packed.activations, why_not_hopper(packed, x)
        if how is None or reason is not None:
            return reason
        if how.dtype != torch.float8_e4m3fn or product_dtype(packed.format) != how.dtype or x.dtype != torch.bfloat16:
            return f"activations are {x.dtype}, to be multiplied as {how.dtype}"
        if how.kind != "dynamic" or how.granularity != "token":
            return f"activations {how} are not quantized by their own rows"
        if packed.layout != BITS.name or len(packed.shape) != 2 or not float8.has_units(x, packed.tensors["codes"]):
            return f"layout {packed.layout} of shape {tuple(packed.shape)}"
        return unaligned(packed)

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if ROW_SCALE in packed.tensors or unaligned(packed) is not None:
            return packed
        tensors = {**packed.tensors, ROW_SCALE: row_scale(packed)}
        return PackedWeight(packed.layout, packed.format, packed.shape, tensors, activations=packed.activations)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        outs, columns = packed.shape
        flat = x.reshape(-1, columns).contiguous()
        if not len(flat):
            return x.new_empty(*x.shape[:-1], outs)
        rows = int8_rows.quantize(flat if flat.data_ptr() % 16 == 0 else flat.clone(), dtype=torch.float8_e4m3fn)
        scale = packed.tensors.get(ROW_SCALE)
        right = (row_scale(packed) if scale is None else scale).reshape(1, outs)
        weight = packed.tensors["codes"].view(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            rows.codes, weight.t(), scale_a=rows.scale[:, None], scale_b=right, bias=bias, out_dtype=x.dtype
        )
        return y.reshape(*x.shape[:-1], outs)
