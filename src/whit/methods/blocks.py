"""Block-wise quantization-aware training: all weights and params of a block together, against the unquantized block.

The first phase of EfficientQAT (Chen et al. 2024, "Efficient Quantization-Aware Training for Large Language Models"),
over any format: Adam on float32 masters of the weights, the scales and the zero points of all matrices of a block,
through straight-through rounding (`straight.py`), to lessen

    sum over tokens t of  || B_Q(x)_t - y_t ||^2 / || y_t ||^2

as `Refine` does (its loop, its targets, its checks on the way). The difference: a weight may go anywhere, and its code
follows its params as they move; refinement moves within the cells that the start has drawn. In memory is one block,
its optimizer, and the inputs of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from whit.errors import RecipeError
from whit.methods.joined import Moving
from whit.methods.refine import BlockDescent
from whit.methods.straight import Straight
from whit.tensor import QuantizedTensor

UNITS = ("steps", "plain")


@dataclass(frozen=True)
class Blocks(BlockDescent):
    """Training of all weights and params of a block, from the codes that `start` chooses.

    - `units`: `steps` counts rates in steps of the format; `plain`, as in the paper, in the units of weights and
      params.
    - `floor`: rates fall along a cosine to this share of themselves.
    - `slow`: the decay of Adam's second average.
    - `inside`: 1 begins with the unquantized weights themselves.

    Other options as in `BlockDescent`.
    """

    steps: int = 400
    rate: float = 0.01
    scale_rate: float = 0.005
    units: str = "steps"
    floor: float = 0.05
    slow: float = 0.95

    name: ClassVar[str] = "blocks"
    weight_bytes: ClassVar[int] = (
        64  # master, decoded twice, its ends, two averages, a sum of gradients; the best found
    )
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {**BlockDescent.bounds, "floor": (0, 1), "slow": (0, 1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units not in UNITS:
            raise RecipeError(f"{self.name}: units {self.units!r}; it must be one of {', '.join(UNITS)}")
        if self.slow == 1:
            raise RecipeError("blocks: slow 1; an average would never move; use less than 1")

    def moving(self, weight: Tensor, quantized: QuantizedTensor) -> Moving:
        """What gradients move: float masters of weights and params."""
        return Straight(weight, quantized, self.inside, self.units == "plain")

    def length(self, step: int) -> float:
        done = (step - 1) / max(self.steps - 1, 1)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def decay(self) -> tuple[float, float]:
        return 0.9, self.slow
