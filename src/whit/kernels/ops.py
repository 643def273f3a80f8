"""Packed products as torch operators, so that torch.compile takes a model with packed linears whole.

`whit::packed_linear(x, tensors, bias, keys, layout, format, shape)` and `whit::packed_floats(...)`: a packed weight
travels as its tensors and the names that give them meaning; `format` is a SPEC, where inputs are quantized a shorthand
of activations, and where it is so `deterministic`, parted by spaces. Dispatch and kernels stay inside, opaque to the
compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from whit.activations import parse_activations
from whit.formats import parse_format
from whit.kernels.base import check_columns
from whit.kernels.dispatch import select
from whit.kernels.unpack import dequantize
from whit.tensor import Format, PackedWeight

DETERMINISTIC = "deterministic"
_format: Any = cache(parse_format)
_activations: Any = cache(parse_activations)


def packed_numbers(packed: PackedWeight) -> str:
    """The SPEC of a packed weight, its activations' shorthand where there are any, `deterministic` where it is."""
    how = () if packed.activations is None else (str(packed.activations),)
    return " ".join((str(packed.format), *how, *((DETERMINISTIC,) if packed.deterministic else ())))


def packed_arguments(
    packed: PackedWeight, numbers: str | None = None
) -> tuple[list[Tensor], tuple[str, str, str, list[int]]]:
    """The tensors of a packed weight, and the arguments (keys, layout, format, shape) that say what they are.

    `numbers` is `packed_numbers(packed)`, made before: torch.compile does not follow every way to print a value.
    """
    numbers = packed_numbers(packed) if numbers is None else numbers
    return list(packed.tensors.values()), (",".join(packed.tensors), packed.layout, numbers, list(packed.shape))


def _packed(tensors: Sequence[Tensor], keys: str, layout: str, format: str, shape: Sequence[int]) -> PackedWeight:
    spec, *rest = format.split(" ")
    known: Format = _format(spec)
    named = dict(zip(keys.split(","), tensors, strict=True))
    how = [_activations(text) for text in rest if text != DETERMINISTIC]
    return PackedWeight(
        layout, known, tuple(shape), named, activations=how[0] if how else None, deterministic=DETERMINISTIC in rest
    )


@torch.library.custom_op("whit::packed_linear", mutates_args=())
def packed_linear_op(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, keys: str, layout: str, format: str, shape: list[int]
) -> Tensor:
    """x (..., in_features) @ weight^T + bias, for inference and as the forward of training."""
    check_columns(x, shape[-1])
    packed = _packed(tensors, keys, layout, format, shape)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return select(packed, x).linear(x, packed, bias)


@packed_linear_op.register_fake
def _(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, keys: str, layout: str, format: str, shape: list[int]
) -> Tensor:
    check_columns(x, shape[-1])
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("whit::packed_floats", mutates_args=())
def packed_floats_op(
    tensors: list[Tensor], keys: str, layout: str, format: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The weight (out_features, in_features) as floats."""
    return dequantize(_packed(tensors, keys, layout, format, shape), dtype)


@packed_floats_op.register_fake
def _(tensors: list[Tensor], keys: str, layout: str, format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, bias, *ctx.names = inputs
    ctx.count, ctx.bias_dtype = len(tensors), None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = grad @ packed_floats_op(list(ctx.saved_tensors), *ctx.names, grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, [None] * ctx.count, db, None, None, None, None


packed_linear_op.register_autograd(_backward, setup_context=_keep)
