"""A table whose rows lie in bands: another kernel's product with each band, the results in the order of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.bands import banded, places
from whit.kernels.base import QUANTIZED_INPUTS, Kernel
from whit.layouts.stream import unpack_stream
from whit.tensor import PackedWeight

PLACES = "places"  # derived: where each row lies when the bands lie one below the other


@dataclass(frozen=True)
class Parts(PackedWeight):
    """A packed weight and, prepared by the kernel for them, its bands."""

    bands: tuple[PackedWeight, ...]


@dataclass(frozen=True)
class Banded:
    """What `kernel` multiplies, band by band."""

    kernel: Kernel

    @property
    def name(self) -> str:
        return f"{self.kernel.name}+bands"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        if (parts := _bands(packed)) is None:
            return "there are no bands"
        if packed.activations is not None:
            return QUANTIZED_INPUTS
        return next((reason for part in parts if (reason := self.kernel.supports(part, x)) is not None), None)

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if isinstance(packed, Parts):
            return packed
        parts = banded(packed)
        assert parts is not None
        ready = tuple(self.kernel.prepare(part) for part in parts)
        tensors = {"codes": packed.tensors["codes"], PLACES: _places(packed)}
        for number, (stored, part) in enumerate(zip(parts, ready, strict=True)):
            tensors |= {f"band{number}_{key}": part.tensors[key] for key in stored.tensors}
        return Parts(packed.layout, packed.format, packed.shape, tensors, bands=ready)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        parts = _bands(packed)
        assert parts is not None
        place = packed.tensors[PLACES] if PLACES in packed.tensors else _places(packed)
        found = torch.cat([self.kernel.linear(x, part, None) for part in parts], dim=-1)
        outputs = found.index_select(-1, place)
        return outputs if bias is None else outputs + bias


def _bands(packed: PackedWeight) -> tuple[PackedWeight, ...] | None:
    return packed.bands if isinstance(packed, Parts) else banded(packed)


def _places(packed: PackedWeight) -> Tensor:
    return places(unpack_stream(packed.tensors["codes"], packed.shape[0], packed.format.bits, 0))
