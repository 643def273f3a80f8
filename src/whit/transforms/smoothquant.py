"""SmoothQuant (Xiao et al. 2022): outliers of activations move into the weights, which round them better.

The input channels of the linears that share an activation x are multiplied by

    s = max|x|^alpha / max|w|^(1 - alpha)     (the paper's eq. 4), max|w| over all rows of all of them,

and x is divided by s where it comes from (`fold.py`). With `steps` alpha is searched in 0, 1/steps, ..., 1 for each
activation: the least expected squared error of the outputs, of rounding the weights and of rounding the activations,

    sum tr(D H D^T) + n e^2 / 12 ||W s||^2,   D = W s - Q(W s),   e = max|x / s| / 127

with H that of x / s, n the number of tokens and e the step of the activations in the worst token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import CalibrationError, RecipeError
from whit.transforms.awq import output_error
from whit.transforms.base import Consumer

SMALLEST = 1e-5  # of a weight or an activation: dead channels are scaled like these
LEVELS = 127


@dataclass(frozen=True)
class SmoothQuant:
    """Smoothing with a given alpha, or with the best of `steps` + 1 where steps is not 0."""

    alpha: float = 0.5
    steps: int = 0

    name: ClassVar[str] = "smoothquant"
    needs_stats: ClassVar[bool] = True
    for_activations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.steps < 0:
            raise RecipeError(
                f"smoothquant: alpha {self.alpha}, steps {self.steps}; they must be in [0, 1] and at least 0; "
                "correct the recipe"
            )

    @property
    def trials(self) -> int:
        return self.steps + 1 if self.steps else 0

    def search(self, consumers: Sequence[Consumer], channels: Tensor) -> Tensor:
        """The scale; ties go to the smaller alpha. CalibrationError where max|x| was not watched."""
        peaks = [stats.peak for consumer in consumers for stats in consumer.stats]
        known = [peak for peak in peaks if peak is not None]
        if len(known) < len(peaks):
            raise CalibrationError("smoothquant: max|x| was not watched; it must be; calibrate the model")
        activation = _largest(torch.stack(known), channels)
        weight = _largest(torch.cat([c.weight.abs().flatten(0, 1) for c in consumers]), channels)
        if not self.steps:
            return smoothing(activation, weight, self.alpha)
        tried = [smoothing(activation, weight, step / self.steps) for step in range(self.trials)]
        errors = [expected_error(consumers, scale, activation) for scale in tried]
        return tried[errors.index(min(errors))]


def smoothing(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha), float32 (in,); 1 where a channel is never used."""
    scale = activation.clamp(min=SMALLEST).pow(alpha) / weight.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where((activation > 0) & (weight > 0), scale, 1.0)


def expected_error(consumers: Sequence[Consumer], scale: Tensor, activation: Tensor) -> float:
    """What rounding the weights costs, and what rounding the activations to steps of their worst token costs."""
    step = float((activation / scale).max()) / LEVELS
    costs = [output_error(consumers, scale)]
    for consumer in consumers:
        for weight, stats in zip(consumer.weight, consumer.stats, strict=True):
            squares = (weight * scale).square().sum(dim=1, dtype=torch.float64)
            costs.append(stats.token_count * step**2 / 12 * fsum(squares.tolist()))
    return fsum(costs)


def _largest(rows: Tensor, channels: Tensor) -> Tensor:
    """The largest of each column (in,) over rows, and over the columns of one channel; float32."""
    columns, where = rows.amax(0).to(torch.float32), channels.to(rows.device)
    most = columns.new_zeros(int(channels.max()) + 1)
    return most.scatter_reduce(0, where, columns, "amax")[where]
