"""SmoothQuant (Xiao et al. 2022): outliers of activations move into the weights, which round them better.

The input channels of the linears that share an activation x are multiplied by

    s = max|x|^alpha / max|w|^(1 - alpha)     (the paper's eq. 4), max|w| over all rows of all of them,

and x is divided by s where it comes from (`fold.py`). The paper gives all activations of a model one alpha. Here it is
searched for each in 0, 1/steps, ..., 1, and in the place of max|x| stands the root mean square over tokens of the same
length: few tokens may have most of what is large, and their own scale takes care of it. What is least is the error

    sum over tokens of |Q(x / s) Q(W s)^T - x W^T|^2 / |x W^T|^2

on a sample of tokens, with both sides rounded, x as its consumers' products will round it, or else by a scale per
token. No scale at all is tried too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import CalibrationError
from whit.named import INF, check_options
from whit.transforms.base import Consumer

SMALLEST = 1e-5  # of a weight or an activation: dead channels are scaled like these
LEVELS = 127


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant (Xiao et al. 2022) with a given `alpha` from 0 to 1.

    Without one, alpha is searched for each activation: the best of `steps` + 1 values and of no scale at all.
    """

    alpha: float | None = None
    steps: int = 20

    name: ClassVar[str] = "smoothquant"
    needs_stats: ClassVar[bool] = True
    for_activations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self, alpha=(0, 1), steps=(1, INF))

    @property
    def trials(self) -> int:
        return self.steps + 2 if self.alpha is None else 0

    def search(self, consumers: Sequence[Consumer], channels: Tensor) -> Tensor:
        """The scale; ties go to the one tried first. CalibrationError where max|x| was not watched."""
        seen = [stats for consumer in consumers for stats in consumer.stats]
        peaks = [stats.peak for stats in seen if stats.peak is not None]
        samples = [stats.sample for stats in seen if stats.sample is not None]
        if len(peaks) < len(seen) or (self.alpha is None and len(samples) < len(seen)):
            raise CalibrationError("smoothquant: max|x| was not watched; it must be; calibrate the model")
        weight = _largest(torch.cat([c.weight.abs().flatten(0, 1) for c in consumers]), channels)
        if self.alpha is not None:
            return smoothing(_largest(torch.stack(peaks), channels), weight, self.alpha)
        usual = _largest(torch.stack([evened(sample).square().mean(0).sqrt() for sample in samples]), channels)
        alphas = [step / self.steps for step in range(self.steps + 1)]
        tried = [torch.ones_like(weight), *(smoothing(usual, weight, alpha) for alpha in alphas)]
        errors = [relative_error(consumers, scale) for scale in tried]
        return tried[errors.index(min(errors))]


def smoothing(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """activation^alpha / weight^(1 - alpha), float32 (in,); 1 where a channel is never used."""
    scale = activation.clamp(min=SMALLEST).pow(alpha) / weight.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where((activation > 0) & (weight > 0), scale, 1.0)


def evened(x: Tensor) -> Tensor:
    """Tokens (tokens, in) of the same length: the root mean square of each is 1, or 0."""
    return x / x.square().mean(1, keepdim=True).sqrt().clamp(min=SMALLEST)


def rounded(x: Tensor) -> Tensor:
    """x (tokens, in) as int8 codes with a scale per token make it."""
    step = x.abs().amax(1, keepdim=True) / LEVELS
    return torch.where(step > 0, (x / step).round() * step, 0.0)


def relative_error(consumers: Sequence[Consumer], scale: Tensor) -> float:
    """What rounding both sides costs, as a share of each token's output, summed over the sample of every matrix."""
    costs: list[float] = []
    for consumer in consumers:
        for weight, stats in zip(consumer.weight, consumer.stats, strict=True):
            assert stats.sample is not None
            exact, scaled = stats.sample @ weight.T, weight * scale
            near = (consumer.inputs or rounded)(stats.sample / scale) @ consumer.rounding(
                scaled, stats.rescaled(scale)
            ).T
            size = exact.square().sum(1, dtype=torch.float64).clamp(min=SMALLEST**2)
            costs += ((near - exact).square().sum(1, dtype=torch.float64) / size).tolist()
    return fsum(costs)


def _largest(rows: Tensor, channels: Tensor) -> Tensor:
    """The largest of each column (in,) over rows, and over the columns of one channel; float32."""
    columns, where = rows.amax(0).to(torch.float32), channels.to(rows.device)
    most = columns.new_zeros(int(channels.max()) + 1)
    return most.scatter_reduce(0, where, columns, "amax")[where]
