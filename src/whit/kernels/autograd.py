"""Gradients through a packed weight: dx = g W, in the activations' type. The weight itself is not trainable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whit.kernels.base import Kernel, check_columns
from whit.kernels.dispatch import select
from whit.kernels.unpack import dequantize
from whit.tensor import PackedWeight


class PackedLinear(torch.autograd.Function):
    """Keeps the packed weight for the backward pass, not the dequantized one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: PackedWeight, kernel: Kernel) -> Tensor:
        ctx.packed = packed
        return kernel.linear(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        dx = grad @ dequantize(ctx.packed, grad.dtype) if ctx.needs_input_grad[0] else None
        db = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None, None


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, kernel: Kernel | None = None) -> Tensor:
    """x (..., in_features) through a packed (out_features, in_features) weight, with gradients for x and bias."""
    check_columns(x, packed.shape[-1])
    kernel = kernel or select(packed, x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return PackedLinear.apply(x, bias, packed, kernel)  # type: ignore[no-any-return, no-untyped-call]
    return kernel.linear(x, packed, bias)
