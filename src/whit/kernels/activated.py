"""The torch kernels for packed weights whose inputs are quantized too: they define correct, on every device.

With a scale per 32 columns a codebook of up to 16 levels is multiplied as `Codebook.in_bytes` rounds it, whatever the
kernel, so that sums of products are integers; with exact columns among them (`int8-g32-exact4`) by its own levels, for
those products are floats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from whit.capabilities import in_bytes, product_dtype, rotation
from whit.kernels import float8, int8
from whit.kernels.reference import dequantize
from whit.layouts import HELD, layout_named
from whit.tensor import Activated, Format, PackedWeight


@dataclass(frozen=True)
class Activation8:
    """int8 and fp8 activations with weights of the same type, any device, any floating-point input."""

    name: ClassVar[str] = "reference-8bit"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        how = packed.activations
        if how is None:
            return "activations are not quantized"
        if not any(layout.name == packed.layout for layout in HELD) or len(packed.shape) != 2:
            return f"layout {packed.layout} of shape {tuple(packed.shape)}"
        if rotation(packed.format):
            return f"{packed.format} wants its inputs rotated first"
        if how.granularity != "group" and product_dtype(packed.format) != how.dtype:
            return f"{packed.format} is not made of {how.dtype}"
        return None if x.is_floating_point() else f"activations are {x.dtype}, not floats"

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        return packed

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        how = packed.activations
        assert how is not None
        flat = x.reshape(-1, packed.shape[1])
        if how.granularity == "group" or how.exact:
            weight = dequantize(replace(packed, format=product_format(packed)))
            wide = torch.nn.functional.linear(rounded_floats(flat, packed), weight)
            y = (wide if bias is None else wide + bias.to(torch.float32)).to(x.dtype)
            return y.reshape(*x.shape[:-1], packed.shape[0])
        weight, row_scale = operands(packed)
        if how.dtype != torch.int8:
            y = float8.float8_linear(flat, weight, row_scale, bias, _float8_rows(flat, packed, how))
        elif how.threshold > 0:
            y = int8.outlier_linear(flat, weight, row_scale, bias, how.threshold)
        else:
            y = int8.int8_linear(flat, weight, row_scale, bias, _int8_rows(flat, packed, how))
        return y.reshape(*x.shape[:-1], packed.shape[0])


def product_format(packed: PackedWeight) -> Format:
    """The format as which a packed weight's codes and params are multiplied by its activations."""
    how = packed.activations
    grouped = how is not None and how.granularity == "group" and not how.exact
    return in_bytes(packed.format) if grouped else packed.format


def rounded_floats(x: Tensor, packed: PackedWeight) -> Tensor:
    """x (rows, in) in float32 as activations per group, or with exact columns, make it."""
    how = packed.activations
    assert how is not None
    if not how.exact:
        return int8.rounded_groups(x)
    return int8.rounded_except(
        x, packed.tensors["input_columns"], packed.tensors["input_low"], how.granularity == "group"
    )


def operands(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """The weight's codes (out, in), int8 or float8_e4m3fn, and its float32 scales (out, 1) or (1, 1)."""
    quantized = layout_named(packed.layout).unpack(packed)
    dtype = product_dtype(packed.format)
    assert dtype is not None, packed.format
    scale: Tensor = packed.format.row_scale(quantized.params)  # type: ignore[attr-defined]
    return quantized.codes.contiguous().view(dtype), scale


def _int8_rows(x: Tensor, packed: PackedWeight, how: Activated) -> int8.Rows:
    if how.kind == "static":
        return int8.quantize_static(x, packed.tensors["input_scale"], packed.tensors.get("input_zero_point"))
    return int8.quantize_rows(x, how.granularity == "tensor", how.symmetric)


def _float8_rows(x: Tensor, packed: PackedWeight, how: Activated) -> int8.Rows:
    if how.kind == "static":
        return float8.quantize_static(x, packed.tensors["input_scale"])
    return float8.quantize_rows(x, how.granularity == "tensor")
