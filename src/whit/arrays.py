"""One tensor at a time: quantize it, and say what was lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats import parse_format
from whit.formats.numeric import check_finite
from whit.methods import RTN, Method, parse_method
from whit.methods.lowrank import beside
from whit.named import require
from whit.tensor import Format, QuantizedTensor, matrix_shape


@dataclass(frozen=True)
class Error:
    """Mean absolute, mean squared and largest absolute error; signal to quantization noise ratio in decibels."""

    mae: float
    mse: float
    sqnr_db: float
    max_abs: float


def quantize_tensor(x: Any, format: str | Format, method: str | Method | None = None) -> QuantizedTensor:
    """Quantize a torch tensor or numpy array of any shape along its last dimension.

    `format` is a Format or its shorthand, `method` one that needs no data (round to nearest unless given). Integers
    are taken as float32. Raises NonFiniteError for NaN and infinity, FormatError for what the format cannot hold.
    """
    tensor = _as_float_tensor(x)
    check_finite(tensor, "tensor")
    chosen = RTN() if method is None else parse_method(method)
    if chosen.needs_stats:
        raise FormatError(f"method {chosen.name}: it needs calibration; use rtn, clip or hqq, or quantize a model")
    matrix = tensor.reshape(matrix_shape(tuple(tensor.shape)))
    done = beside(chosen)(matrix, None, parse_format(format))
    return QuantizedTensor(done.format, tuple(tensor.shape), done.codes, done.params)


def error(x: Any, quantized: QuantizedTensor) -> Error:
    """How far `quantized` is from `x`, computed in float64; FormatError if their shapes differ.

    `x` is a tensor or array of `quantized.shape`. Errors are in the units of x, `mse` in their square.
    """
    require(quantized, QuantizedTensor, "error", "it must be what whit.quantize_tensor gives; pass that", FormatError)
    original = _as_float_tensor(x).double()
    if original.shape != torch.Size(quantized.shape):
        raise FormatError(
            f"error: x has shape {list(original.shape)} and the quantized tensor {list(quantized.shape)}; "
            "they must be equal; pass what was quantized"
        )
    difference = quantized.dequantize(torch.float64).to(original.device) - original
    noise, signal = float(difference.square().mean()), float(original.square().mean())
    ratio = torch.tensor(signal, dtype=torch.float64) / noise if noise else torch.tensor(float("inf"))
    sqnr = float(10 * torch.log10(ratio)) if signal or not noise else float("-inf")
    return Error(float(difference.abs().mean()), noise, sqnr, float(difference.abs().max()))


def _as_float_tensor(x: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(x).detach()
    except (TypeError, ValueError, RuntimeError):
        raise FormatError(
            f"tensor: {type(x).__name__} holds no numbers; it must be a tensor or an array; give one"
        ) from None
    if tensor.is_complex() or not tensor.numel():
        what = "complex numbers" if tensor.is_complex() else f"shape {list(tensor.shape)}"
        raise FormatError(f"tensor: {what}; it must hold real numbers, at least one; give such a tensor")
    wide = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return tensor if wide else tensor.to(torch.float32)
