"""How far a param in training goes in one unit: as far as moves its weights by one step of the format."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.tensor import QuantizedTensor

TINY = torch.finfo(torch.float32).tiny


def unit_of(name: str, value: Tensor, start: QuantizedTensor, step: Tensor) -> Tensor:
    """A unit of the param `name` of `start`, one for each of its groups.

    `value` float32 is the param; `step` (rows, columns) the distance of neighbouring numbers around each weight. The
    unit moves the weights that share the param by their steps in the root mean square. A group that does not answer to
    the param as its codes now are (zeros, to their scale) gets the unit of one whose weights move as the param does.
    """
    format, codes = start.format, start.codes
    ends = [format.decode(codes, {**start.params, name: end}) for end in (torch.ones_like(value), 0 * value)]
    steepness = format.sums((ends[0] - ends[1]).square_())
    steepness = torch.where(steepness > 0, steepness.clamp(min=TINY), format.sums(torch.ones_like(step)))
    return (format.sums(step.square()) / steepness).sqrt_()
