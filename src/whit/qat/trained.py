"""The parameters of a model in training, each in the shape that the model has it in.

What is learned of a parameter: all of it (`methods/straight`, weights and params), the params alone while its codes
lie packed (`Frozen`), or the floats of one that is kept (`Kept`).

Matrices of as many columns and one format are joined (`methods/joined`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from whit.layouts import BITS
from whit.methods.latent import Latent
from whit.methods.learned import Learned
from whit.tensor import PackedWeight, QuantizedTensor

Value: TypeAlias = QuantizedTensor | Tensor


class Trained(Protocol):
    """Some parameters on their way."""

    @property
    def variables(self) -> dict[str, Tensor]:
        """What is moved in place, by name; "" are weights (in bands: `band0/`), other names are params."""
        ...

    def decode(self) -> dict[str, Tensor]:
        """The parameters as they will be stored, float32, in the model's shapes."""
        ...

    def gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From a loss's gradients in what `decode` gave to those in `variables`."""
        ...

    def confine(self) -> None:
        """Bring back what went too far."""
        ...

    def values(self) -> Mapping[str, Value]:
        """What `decode` last gave, as it will be stored."""
        ...


class Frozen:
    """Codes that stay, packed in layout `bits`, under params that are learned; gradients are exact."""

    def __init__(self, start: QuantizedTensor, plain: bool = False) -> None:
        self.format, self.shape, self.dtype = start.format, start.shape, start.codes.dtype
        step = Latent(start.format.decode(start.codes, start.params), start, 0.0, 1.0).step
        self.learned = Learned(start, step, plain)
        packed = BITS.pack(QuantizedTensor(start.format, tuple(start.codes.shape), start.codes, start.params))
        self.packed = PackedWeight(packed.layout, packed.format, packed.shape, dict(packed.tensors))
        self.learned.start = QuantizedTensor(start.format, start.shape, start.codes[:0], start.params)

    @property
    def variables(self) -> dict[str, Tensor]:
        return dict(self.learned.moves)

    def decode(self) -> Tensor:
        return self.format.decode(self._codes(), self.learned.store())

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        used = self.learned.used()
        with torch.enable_grad():
            decoded = self.format.decode(self._codes(), {**self.learned.params, **used})
        return self.learned.gradients(decoded, used, gradient.to(torch.float32))

    def confine(self) -> None:
        self.learned.confine()

    def quantized(self) -> QuantizedTensor:
        return QuantizedTensor(self.format, self.shape, self._codes(), self.format.seal(self.learned.params))

    def _codes(self) -> Tensor:
        return BITS.unpack(self.packed).codes


class Kept:
    """A parameter that stays in floats and is trained: a norm, a bias, an embedding. Its unit is its rows' size."""

    def __init__(self, name: str, start: Tensor, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        exact = start.to(torch.float32)
        size = exact.square().mean(dim=-1, keepdim=True).sqrt_()
        self.unit = torch.where(size > 0, size, 1.0)
        self.master = exact / self.unit

    @property
    def variables(self) -> dict[str, Tensor]:
        return {"": self.master}

    def decode(self) -> dict[str, Tensor]:
        return {self.name: self._stored().to(torch.float32)}

    def gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"": gradients[self.name].to(torch.float32) * self.unit}

    def confine(self) -> None:
        """Floats may go anywhere."""

    def values(self) -> dict[str, Value]:
        return {self.name: self._stored()}

    def _stored(self) -> Tensor:
        return (self.master * self.unit).to(self.dtype)
