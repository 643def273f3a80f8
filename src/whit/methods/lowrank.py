"""Codes and a product of two thin matrices beside them, chosen for each other: W ~ Q + B A.

Rounds alternate, as in LoftQ (Li et al. 2023, algorithm 1) and CALDERA (Saha et al. 2024): Q is W - B A quantized,
then B A is the best product for W - Q (`formats.factors`), measured on the inputs where their hessian is known. A round
can be worse than the one before it, since no method of quantization is a projection; the best one is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.bands import bands_of
from whit.formats.factors import best_factors
from whit.formats.lowrank import DTYPE, side_car
from whit.methods.bands import in_bands
from whit.methods.base import Method, Quantizer
from whit.methods.rotated import turned
from whit.methods.stack import energy
from whit.tensor import Format, LayerStats, QuantizedTensor

ROUNDS = 3
Quantize = Callable[[Tensor], QuantizedTensor]


def beside(method: Method, use: Tensor | None = None) -> Quantizer:
    """The method as it is, but for formats with a side-car, of which it chooses the codes and this the product, and for
    those of bands, each of which it quantizes by itself. `use` (rows,): how often each row is used.

    Formats that rotate are given the rotated matrix (`methods.rotated`).
    """
    quantizer = turned(method)

    def quantize(weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        if (bands := bands_of(format)) is not None:
            return in_bands(quantize, weight, stats, bands, use)
        found = side_car(format)
        if found is None:
            return quantizer(weight, stats, format)
        base, hessian = found.base, None if stats is None else stats.hessian

        def codes(matrix: Tensor) -> QuantizedTensor:
            return quantizer(matrix, stats, base)

        return joined(factored(codes, weight, hessian, found.rank, ROUNDS, DTYPE), format)

    return quantize


def repaired(quantized: QuantizedTensor, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
    """Codes that stay as they are, in a format that may give them a side-car."""
    found = side_car(format)
    if found is None:
        return quantized
    hessian = None if stats is None else stats.hessian
    return joined(with_factors(quantized, weight, hessian, found.rank, DTYPE), format)


@dataclass(frozen=True)
class Factored:
    """W ~ Q + B A: `b` (out, rank), `a` (rank, in). `lost` is what remains of the squared error of the outputs (of the
    weights, where there is no hessian)."""

    quantized: QuantizedTensor
    b: Tensor
    a: Tensor
    lost: float


def factored(
    quantize: Quantize,
    weight: Tensor,
    hessian: Tensor | None,
    rank: int,
    rounds: int,
    dtype: torch.dtype,
    start: QuantizedTensor | None = None,
) -> Factored:
    """The best of `rounds` rounds for a matrix (out, in), the factors rounded to `dtype`.

    `start` are the first round's codes; without them W itself is quantized.
    """
    weight = weight.to(torch.float32)
    best = last = with_factors(quantize(weight) if start is None else start, weight, hessian, rank, dtype)
    for _ in range(rounds - 1):
        target = weight - last.b.to(torch.float32) @ last.a.to(torch.float32)
        last = with_factors(quantize(target), weight, hessian, rank, dtype)
        best = min(best, last, key=lambda found: found.lost)
    return best


def with_factors(
    quantized: QuantizedTensor, weight: Tensor, hessian: Tensor | None, rank: int, dtype: torch.dtype
) -> Factored:
    """The best factors beside codes that stay as they are."""
    error = weight.to(torch.float64) - quantized.dequantize().to(torch.float64)
    b, a = (factor.to(dtype) for factor in best_factors(error, hessian, rank))
    return Factored(quantized, b, a, lost(error - b.to(torch.float64) @ a.to(torch.float64), hessian))


def lost(error: Tensor, hessian: Tensor | None) -> float:
    """tr(E H E^T), or the sum of squares without a hessian."""
    return float(error.square().sum() if hessian is None else energy(error, hessian).sum())


def joined(found: Factored, format: Format) -> QuantizedTensor:
    """Codes and factors as one value of a format with a side-car."""
    rank = side_car(format)
    assert rank is not None, format
    params = rank.join(found.quantized.params, found.b, found.a)
    return QuantizedTensor(format, found.quantized.shape, found.quantized.codes, params)
