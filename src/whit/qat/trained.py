"""The parameters of a model in training, each in the shape that the model has it in.

What is learned of a parameter: all of it (`methods/straight`, weights and params), the params alone while its codes
lie packed (`Frozen`), or the floats of one that is kept (`Kept`).

Matrices of as many columns and one format are joined, one below the other, where no param is shared between rows: a
GPU is then asked for a few large kernels in the place of many small ones, and computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from whit.layouts import BITS
from whit.methods.latent import Latent
from whit.methods.learned import Learned
from whit.methods.refine import Moving
from whit.tensor import Format, PackedWeight, QuantizedTensor

Shape: TypeAlias = Callable[[Tensor], Tensor]
Value: TypeAlias = QuantizedTensor | Tensor


class Trained(Protocol):
    """Some parameters on their way."""

    @property
    def variables(self) -> dict[str, Tensor]:
        """What is moved in place, by name; "" are weights, other names are params."""
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

    def values(self) -> dict[str, Value]:
        """What `decode` last gave, as it will be stored."""
        ...


@dataclass(frozen=True)
class Part:
    """A parameter among joined ones: `matrix` brings the model's shape to its `rows`, `parameter` back."""

    name: str
    rows: int
    matrix: Shape
    parameter: Shape


@dataclass(frozen=True)
class Matrices:
    """Quantized parameters, their rows one below the other."""

    parts: Sequence[Part]
    moving: Moving

    @property
    def variables(self) -> dict[str, Tensor]:
        return self.moving.variables

    def decode(self) -> dict[str, Tensor]:
        rows = self._split(self.moving.decode())
        return {part.name: part.parameter(own) for part, own in zip(self.parts, rows, strict=True)}

    def gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.moving.gradients(torch.cat([part.matrix(gradients[part.name]) for part in self.parts]))

    def confine(self) -> None:
        self.moving.confine()

    def values(self) -> dict[str, Value]:
        whole = self.moving.quantized()
        if len(self.parts) == 1:
            return {self.parts[0].name: whole}
        found: dict[str, Value] = {}
        first = 0
        for part in self.parts:
            rows = slice(first, first := first + part.rows)
            params = {name: param[rows] for name, param in whole.params.items() if isinstance(param, Tensor)}
            codes = whole.codes[rows]
            found[part.name] = QuantizedTensor(whole.format, tuple(codes.shape), codes, params)
        return found

    def _split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return torch.split(matrix, [part.rows for part in self.parts])


def can_join(format: Format, columns: int) -> bool:
    """Whether matrices of this format can lie one below the other: no param belongs to two rows."""
    specs = format.param_specs(2, columns).values()
    return format.row_independent and all(spec.format is None and spec.shape[0] == 2 for spec in specs)


def join(values: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices one below the other."""
    if len(values) == 1:
        return values[0]
    codes = torch.cat([value.codes for value in values])
    params = {name: torch.cat([_tensor(value, name) for value in values]) for name in values[0].params}
    return QuantizedTensor(values[0].format, tuple(codes.shape), codes, params)


def _tensor(value: QuantizedTensor, name: str) -> Tensor:
    param = value.params[name]
    assert isinstance(param, Tensor)
    return param


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
