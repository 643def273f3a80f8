"""Matrices in training whose format is around others: codes of the rotated matrix, or rows in several bands.

A rotated one is trained in the basis of its codes: w = v H, and since H is orthogonal and symmetric the gradient in v
is that in w times H. Of one in bands each is trained by itself, in the rows that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from whit.formats.bands import bands_of, places
from whit.formats.rotated import Rotated, as_rotated
from whit.methods.joined import Moving
from whit.tensor import QuantizedTensor

W = TypeVar("W", Tensor, None)


def moving_parts(make: Callable[[W, QuantizedTensor], Moving], weight: W, start: QuantizedTensor) -> Moving:
    """What `make` makes of a weight (rows, columns; None where codes stay) and its codes, or of all their parts."""
    if bands_of(start.format) is not None:
        bands: dict[str, Moving] = {}
        for i, (name, part) in enumerate(start.params.items()):
            assert isinstance(part, QuantizedTensor)
            own = weight if weight is None else weight[start.codes[0] == i]
            bands[name] = moving_parts(make, own, part)
        return Banded(start, bands)
    if (format := as_rotated(start.format)) is not None:
        codes = QuantizedTensor(format.base, start.shape, start.codes, start.params)
        return Turned(format, make(weight if weight is None else format.turned(weight), codes))
    return make(weight, start)


@dataclass(frozen=True)
class Turned:
    """A matrix whose codes are of the rotated one, which `moving` is."""

    format: Rotated
    moving: Moving

    @property
    def variables(self) -> dict[str, Tensor]:
        return self.moving.variables

    def decode(self) -> Tensor:
        return self.format.turned(self.moving.decode())

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        return self.moving.gradients(self.format.turned(gradient))

    def confine(self) -> None:
        self.moving.confine()

    def quantized(self) -> QuantizedTensor:
        codes = self.moving.quantized()
        return QuantizedTensor(self.format, codes.shape, codes.codes, codes.params)


@dataclass(frozen=True)
class Banded:
    """A table whose rows lie in `bands`, by name of the param; `start` says which row in which. No row moves."""

    start: QuantizedTensor
    bands: dict[str, Moving]

    @property
    def variables(self) -> dict[str, Tensor]:
        """By name of the band: `band0/` are its weights, `band0/scale` its scales."""
        return {f"{name}/{key}": v for name, band in self.bands.items() for key, v in band.variables.items()}

    def decode(self) -> Tensor:
        return torch.cat([band.decode() for band in self.bands.values()])[places(self.start.codes)]

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, (name, band) in enumerate(self.bands.items()):
            own = band.gradients(gradient[self.start.codes[0] == i])
            found |= {f"{name}/{key}": value for key, value in own.items()}
        return found

    def confine(self) -> None:
        for band in self.bands.values():
            band.confine()

    def quantized(self) -> QuantizedTensor:
        start, bands = self.start, {name: band.quantized() for name, band in self.bands.items()}
        return QuantizedTensor(start.format, start.shape, start.codes, bands)


def moves_weights(key: str) -> bool:
    """Whether a name among `variables` is of weights, not of params."""
    return not key.rpartition("/")[2]
