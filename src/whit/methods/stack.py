"""A parameter may be a stack of matrices (experts), each with statistics of its own: quantize and measure it whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whit.methods.base import Quantizer
from whit.tensor import Format, LayerStats, QuantizedTensor, tensor_param


def quantize_stack(method: Quantizer, weight: Tensor, stats: Sequence[LayerStats], format: Format) -> QuantizedTensor:
    """Matrices that lie below each other, (matrices x rows, columns), one LayerStats each."""
    if len(stats) == 1:
        return method(weight, stats[0], format)
    parts = [method(rows, s, format) for rows, s in zip(weight.chunk(len(stats)), stats, strict=True)]
    codes = torch.cat([part.codes for part in parts])
    params = {name: torch.cat([tensor_param(part.params, name) for part in parts]) for name in parts[0].params}
    return QuantizedTensor(format, tuple(weight.shape), codes, params)


def can_stack(format: Format) -> bool:
    """Whether matrices quantized one by one are those of the stack: no param spans several rows."""
    return format.row_independent and all(spec.format is None for spec in format.param_specs(1, 1).values())


def proxy_loss(weight: Tensor, approximation: Tensor, stats: Sequence[LayerStats]) -> float:
    """tr(dW H dW^T) / tr(W H W^T), summed over the matrices of a stack: the share of the output's energy lost."""
    pairs = zip(weight.chunk(len(stats)), stats, strict=True)
    whole = sum(float(energy(exact.to(torch.float32), s.hessian).sum()) for exact, s in pairs)
    return energy_lost(weight, approximation, stats) / whole if whole > 0 else 0.0


def energy_lost(weight: Tensor, approximation: Tensor, stats: Sequence[LayerStats]) -> float:
    """tr(dW H dW^T), summed over the matrices of a stack (matrices x rows, columns)."""
    count = len(stats)
    parts = zip(weight.chunk(count), approximation.chunk(count), stats, strict=True)
    return sum(float(energy(exact.to(torch.float32) - near, s.hessian).sum()) for exact, near, s in parts)


def energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """diag(M H M^T) (rows,) in float64: the squared size of each row's outputs, summed over the tokens."""
    return ((matrix @ hessian.to(matrix.dtype)) * matrix).sum(dim=1, dtype=torch.float64)
