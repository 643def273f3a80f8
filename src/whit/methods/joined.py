"""Matrices in training, joined: of as many columns and one format, one below the other, where no param is shared
between rows. A GPU is then asked for a few large kernels in the place of many small ones, and computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from whit.tensor import Format, QuantizedTensor

JOINED = 1 << 24  # weights at most; what they are decoded to and led back through takes 64 MB a tensor
Shape: TypeAlias = Callable[[Tensor], Tensor]


class Moving(Protocol):
    """A quantized matrix that a gradient can move."""

    @property
    def variables(self) -> dict[str, Tensor]:
        """What may be moved in place: what lies behind the codes under "", the params' moves under their names."""
        ...

    def decode(self) -> Tensor:
        """The weights (rows, columns) float32 as they now are, rounded as stored."""
        ...

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """From a loss's gradient in the weights that `decode` gave to those in `variables`."""
        ...

    def confine(self) -> None:
        """Bring back what went too far."""
        ...

    def quantized(self) -> QuantizedTensor:
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
        """By name, float32, in the model's shapes."""
        rows = self._split(self.moving.decode())
        return {part.name: part.parameter(own) for part, own in zip(self.parts, rows, strict=True)}

    def gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From those in what `decode` gave to those in `variables`."""
        whole = torch.cat([part.matrix(gradients[part.name]) for part in self.parts])
        return self.moving.gradients(whole.to(torch.float32))

    def confine(self) -> None:
        self.moving.confine()

    def values(self) -> dict[str, QuantizedTensor]:
        """What `decode` last gave, as it will be stored."""
        whole = self.moving.quantized()
        if len(self.parts) == 1:
            return {self.parts[0].name: whole}
        found: dict[str, QuantizedTensor] = {}
        first = 0
        for part in self.parts:
            rows = slice(first, first := first + part.rows)
            params = {name: param[rows] for name, param in whole.params.items() if isinstance(param, Tensor)}
            codes = whole.codes[rows]
            found[part.name] = QuantizedTensor(whole.format, tuple(codes.shape), codes, params)
        return found

    def _split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return torch.split(matrix, [part.rows for part in self.parts])


def grouped(matrices: Sequence[tuple[str, Format, tuple[int, int]]], device: torch.device) -> list[list[str]]:
    """Names (with format and shape) of what is joined, in order. On a CPU each is a task of its own."""
    groups: list[list[str]] = []
    latest: dict[tuple[Format, int], tuple[list[str], int]] = {}
    for name, format, (rows, columns) in matrices:
        group, size = latest.get((format, columns), ([], JOINED))
        if device.type == "cpu" or size + rows * columns > JOINED or not can_join(format, columns):
            group, size = [], 0
            groups.append(group)
        group.append(name)
        latest[format, columns] = group, size + rows * columns
    return groups


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
