"""What a transform is: it chooses a scale for each channel of an activation, by what rounding then costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from whit.tensor import LayerStats

# A float32 matrix (out, in) and its statistics to what a format and a method make of it.
Rounding: TypeAlias = Callable[[Tensor, LayerStats], Tensor]
# Inputs (tokens, in) to what their rounding makes of them.
Inputs: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Consumer:
    """A parameter that multiplies the activation: `weight` (matrices, out, in) float32, with one LayerStats each.

    `inputs` rounds the activation as this parameter's product will; None where that is not known.
    """

    weight: Tensor
    stats: tuple[LayerStats, ...]
    rounding: Rounding
    inputs: Inputs | None = None

    def matrix(self, index: int) -> Consumer:
        """One matrix of a stack by itself."""
        return Consumer(self.weight[index : index + 1], self.stats[index : index + 1], self.rounding, self.inputs)


@runtime_checkable
class Transform(Protocol):
    """A frozen dataclass of options; the same inputs give the same scale."""

    @property
    def name(self) -> str: ...
    @property
    def needs_stats(self) -> bool:
        """Whether it needs statistics of the activation, and so a calibration text."""
        ...

    @property
    def for_activations(self) -> bool:
        """Whether it is made for quantized activations: a recipe that names it alone quantizes them too."""
        ...

    @property
    def trials(self) -> int:
        """How often `search` rounds every weight, for estimates of time."""
        ...

    def search(self, consumers: Sequence[Consumer], channels: Tensor) -> Tensor:
        """The scale (in,) float32, positive, that multiplies the columns of all consumers and divides their input.

        Columns with the same number in `channels` (in,) int64, which channel of the source they come from, share one.
        """
        ...
