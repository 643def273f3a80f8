"""Formats that rotate: a method sees the rotated matrix, statistics of rotated inputs, and the format of the codes."""

from __future__ import annotations

from torch import Tensor

from whit.formats.rotated import as_rotated
from whit.methods.base import Method, Quantizer
from whit.tensor import Format, LayerStats, QuantizedTensor


def turned(method: Method) -> Quantizer:
    """The method as it is, but for formats that rotate, of which it chooses the codes in their own basis."""

    def quantize(weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        wanted = as_rotated(format)
        if wanted is None:
            return method(weight, stats, format)
        seen = None if stats is None else stats.rotated(wanted.rotation)
        found = method(wanted.turned(weight), seen, wanted.base)
        return QuantizedTensor(format, found.shape, found.codes, found.params)

    return quantize
