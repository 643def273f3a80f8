"""The torch kernel that defines correct: dequantize to the activations' type, multiply in it.

Sums are accumulated as torch accumulates them for that type (float32 for 16-bit types). Runs on every device.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from whit.kernels.base import QUANTIZED_INPUTS
from whit.layouts import HELD, layout_named
from whit.tensor import PackedWeight, matrix_shape

CHUNK = 1 << 24  # weights dequantized at a time: bounds the float32 intermediates to a few of 64 MiB


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats that a packed weight stands for, in its shape."""
    layout = layout_named(packed.layout)
    rows, columns = matrix_shape(packed.shape)
    if rows * columns <= CHUNK:
        return layout.unpack(packed).dequantize(dtype)
    weight = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(CHUNK // columns, 1)
    for start in range(0, rows, step):
        index = torch.arange(start, min(start + step, rows), device=packed.device)
        weight[start : start + step] = layout.rows(packed, index)
    return weight.reshape(packed.shape)


class Reference:
    """Any format, any device, any floating-point type."""

    name: ClassVar[str] = "reference"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        if packed.activations is not None:
            return QUANTIZED_INPUTS
        if not any(layout.name == packed.layout for layout in HELD):
            return f"layout {packed.layout} is not known"
        return None if x.is_floating_point() else f"activations are {x.dtype}, not floats"

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        return packed

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, dequantize(packed, x.dtype), bias)
