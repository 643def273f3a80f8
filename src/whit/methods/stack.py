"""A parameter may be a stack of matrices (experts), each with statistics of its own: quantize and measure it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from whit.methods.base import Quantizer
from whit.tensor import Format, LayerStats, Params, QuantizedTensor, tensor_param


def quantize_stack(method: Quantizer, weight: Tensor, stats: Sequence[LayerStats], format: Format) -> QuantizedTensor:
    """Matrices that lie below each other, (matrices x rows, columns), one LayerStats each."""
    return method(weight, stats[0], format) if len(stats) == 1 else _each(method, weight, stats, format)


def weighted_stack(
    method: Callable[[Tensor, Tensor, Format], QuantizedTensor], weight: Tensor, importance: Tensor, format: Format
) -> QuantizedTensor:
    """Matrices below each other, each by the weights of its columns: `importance` (columns,) or (matrices, columns).

    Where params span matrices these are quantized as one, by the mean of their weights.
    """
    if importance.dim() == 1 or not can_stack(format):
        return method(weight, importance if importance.dim() == 1 else importance.mean(dim=0), format)
    return _each(method, weight, importance, format)


def _each(
    method: Callable[..., QuantizedTensor], weight: Tensor, given: Sequence[LayerStats] | Tensor, format: Format
) -> QuantizedTensor:
    """Each matrix of a stack by the method, with the one of those `given` that belongs to it."""
    parts = (method(rows, own, format) for rows, own in zip(weight.chunk(len(given)), given, strict=True))
    codes, params = joined(((part.codes, part.params) for part in parts), len(weight))
    return QuantizedTensor(format, tuple(weight.shape), codes, params)


def joined(parts: Iterable[tuple[Tensor, Params]], rows: int) -> tuple[Tensor, Params]:
    """Codes and params that lie below each other, each put in its place as it comes: never twice in memory."""
    found: dict[str, Tensor] = {}
    first = 0
    for codes, params in parts:
        for name, part in {"": codes, **{name: tensor_param(params, name) for name in params}}.items():
            whole = found.setdefault(name, part if len(codes) == rows else part.new_empty((rows, *part.shape[1:])))
            if whole is not part:
                whole[first : first + len(part)] = part
        first += len(codes)
    return found.pop(""), found


def can_stack(format: Format) -> bool:
    """Whether matrices quantized one by one are those of the stack: no param spans several rows."""
    return format.row_independent and all(spec.format is None for spec in format.param_specs(1, 1).values())


def proxy_loss(weight: Tensor, approximation: Tensor, stats: Sequence[LayerStats]) -> float:
    """tr(dW H dW^T) / tr(W H W^T), summed over the matrices of a stack: the share of the output's energy lost."""
    count = len(stats)
    return share_lost(zip(weight.chunk(count), approximation.chunk(count), stats, strict=True))


def share_lost(matrices: Iterable[tuple[Tensor, Tensor, LayerStats]]) -> float:
    """The same of (matrix, approximation, statistics), one after the other."""
    lost = whole = 0.0
    for weight, near, stats in matrices:
        exact = weight.to(torch.float32)
        whole += float(energy(exact, stats.hessian).sum())
        lost += float(energy(exact - near, stats.hessian).sum())
    return lost / whole if whole > 0 else 0.0


def energy_lost(weight: Tensor, approximation: Tensor, stats: Sequence[LayerStats]) -> float:
    """tr(dW H dW^T), summed over the matrices of a stack (matrices x rows, columns)."""
    count = len(stats)
    parts = zip(weight.chunk(count), approximation.chunk(count), stats, strict=True)
    return sum(float(energy(exact.to(torch.float32) - near, s.hessian).sum()) for exact, near, s in parts)


def energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """diag(M H M^T) (rows,) in float64: the squared size of each row's outputs, summed over the tokens."""
    return ((matrix @ hessian.to(matrix.dtype)) * matrix).sum(dim=1, dtype=torch.float64)
