"""A table whose rows lie in bands: other kernels' products with the bands, the results in the order of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.bands import banded, places
from whit.kernels.base import QUANTIZED_INPUTS, Kernel
from whit.layouts.stream import unpack_stream
from whit.tensor import PackedWeight

PLACES = "places"  # derived: where each row lies when the bands lie one below the other


@dataclass(frozen=True)
class Parts(PackedWeight):
    """A packed weight and its bands, each prepared by the kernel that multiplies it."""

    bands: tuple[PackedWeight, ...]
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Banded:
    """Each band by the first of `kernels` that multiplies it."""

    kernels: tuple[Kernel, ...]

    name: ClassVar[str] = "bands"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        bands = packed.bands if isinstance(packed, Parts) else banded(packed)
        if bands is None:
            return "there are no bands"
        if packed.activations is not None:
            return QUANTIZED_INPUTS
        for band in bands:
            if self._kernel(band, x) is None:
                return f"a band in {band.format}: " + "; ".join(
                    f"{k.name}: {k.supports(band, x)}" for k in self.kernels
                )
        return None

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if isinstance(packed, Parts):
            return packed
        bands, kernels = self._chosen(
            packed, torch.empty(1, packed.shape[1], dtype=torch.bfloat16, device=packed.device)
        )
        ready = tuple(kernel.prepare(band) for band, kernel in zip(bands, kernels, strict=True))
        tensors = {"codes": packed.tensors["codes"], PLACES: _places(packed)}
        for number, (stored, band) in enumerate(zip(bands, ready, strict=True)):
            tensors |= {f"band{number}_{key}": band.tensors[key] for key in stored.tensors}
        return Parts(packed.layout, packed.format, packed.shape, tensors, bands=ready, kernels=kernels)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        if isinstance(packed, Parts):
            bands, kernels = packed.bands, packed.kernels
        else:
            bands, kernels = self._chosen(packed, x)
        place = packed.tensors[PLACES] if PLACES in packed.tensors else _places(packed)
        products = [kernel.linear(x, band, None) for band, kernel in zip(bands, kernels, strict=True)]
        outputs = torch.cat(products, dim=-1).index_select(-1, place)
        return outputs if bias is None else outputs + bias

    def _kernel(self, band: PackedWeight, x: Tensor) -> Kernel | None:
        return next((kernel for kernel in self.kernels if kernel.supports(band, x) is None), None)

    def _chosen(self, packed: PackedWeight, x: Tensor) -> tuple[tuple[PackedWeight, ...], tuple[Kernel, ...]]:
        """The bands as they are stored, and what multiplies them: the device and the format decide it."""
        bands = banded(packed)
        assert bands is not None
        found = tuple(kernel for band in bands if (kernel := self._kernel(band, x)) is not None)
        return bands, found


def _places(packed: PackedWeight) -> Tensor:
    return places(unpack_stream(packed.tensors["codes"], packed.shape[0], packed.format.bits, 0))
