"""AWQ: activation-aware weight quantization (Lin et al. 2023).

A weight that meets large activations is salient, and rounding it hurts least where it is large itself. So the input
channels of the linears that share an activation x are scaled by

    s = mean|x|^alpha,   alpha = 0, 1/20, ..., 1   (the paper's eq. 5),   divided by sqrt(max s min s)

and 1/s goes to where x comes from (`fold.py`). The alpha is taken that has the least error of all outputs together,

    sum ||(W - Q(W s) / s) X||^2 = sum tr(D H D^T),   D = W - Q(W s) / s,   H = X X^T

which the hessian gives exactly, without the activations. Q is round to nearest in each linear's own format. Alpha 0
is no scaling at all: the error is never larger than without the transform.
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

RANGE = 1e6  # of mean|x|; channels that are smaller or dead are scaled like the smallest within it


@dataclass(frozen=True)
class AWQ:
    """Activation-aware scaling (Lin et al. 2023): of scales mean|x|^alpha the one whose rounded outputs err least.

    `steps` + 1 values of alpha from 0 to 1 are tried for each activation.
    """

    steps: int = 20

    name: ClassVar[str] = "awq"
    needs_stats: ClassVar[bool] = True
    for_activations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, steps=(1, INF))

    @property
    def trials(self) -> int:
        return self.steps + 1

    def search(self, consumers: Sequence[Consumer], channels: Tensor) -> Tensor:
        """The best of the scales; ties go to the smaller alpha. CalibrationError where |x| was not summed."""
        size, device = mean_magnitude(consumers, channels), consumers[0].weight.device
        tried = [scale_of(size, step / self.steps).to(device) for step in range(self.trials)]
        errors = [output_error(consumers, scale) for scale in tried]
        return tried[errors.index(min(errors))]


def mean_magnitude(consumers: Sequence[Consumer], channels: Tensor) -> Tensor:
    """mean|x| (in,) float64 over all tokens that the consumers saw, averaged over columns of the same channel."""
    stats = [s for consumer in consumers for s in consumer.stats]
    sums = [s.magnitude.cpu().to(torch.float64) for s in stats if s.magnitude is not None]
    tokens = sum(s.token_count for s in stats)
    if len(sums) < len(stats) or not tokens:
        raise CalibrationError("awq: no token reached this activation, or |x| was not summed; calibrate the model")
    mean = torch.stack(sums).sum(0) / tokens
    total = mean.new_zeros(int(channels.max()) + 1).index_add_(0, channels, mean)
    count = torch.zeros_like(total).index_add_(0, channels, torch.ones_like(mean))
    return (total / count)[channels]


def scale_of(size: Tensor, alpha: float) -> Tensor:
    """size^alpha (in,) in float32, its largest and smallest value equally far from 1."""
    if not float(size.max()) > 0:
        return torch.ones_like(size, dtype=torch.float32)
    scale = size.clamp(min=float(size.max()) / RANGE).pow(alpha)
    return (scale / (scale.max() * scale.min()).sqrt()).to(torch.float32)


def output_error(consumers: Sequence[Consumer], scale: Tensor) -> float:
    """sum tr(D H D^T) over all matrices, D = W s - Q(W s) and H that of x / s; rows are added exactly, in any order."""
    rows: list[float] = []
    for consumer in consumers:
        for weight, stats in zip(consumer.weight, consumer.stats, strict=True):
            scaled, seen = weight * scale, stats.rescaled(scale)
            error = scaled - consumer.rounding(scaled, seen)
            rows += ((error @ seen.hessian) * error).sum(dim=1, dtype=torch.float64).tolist()
    return fsum(rows)
