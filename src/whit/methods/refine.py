"""Block-wise refinement: gradient descent on the rounding and the scales of all matrices of a block together.

SignRound (Cheng et al. 2023, "Optimize weight rounding via signed gradient descent") and the first phase of
EfficientQAT (Chen et al. 2024), as a step after calibration: from the codes of a `start`, it lessens

    sum over tokens t of  || B_Q(x)_t - y_t ||^2 / || y_t ||^2

B_Q(x) is the quantized block on the inputs of the quantized model so far, y what the unquantized model has there. A
token counts by its relative error, because the norms behind a block see no other; `loss = "mse"` leaves out the
division, and then the few tokens with huge activations rule. What moves is said in `latent.py`.

The whole calibration set is measured at the start and `checks` times on the way; the best is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import RecipeError
from whit.methods.base import Block, Method
from whit.methods.descent import Descent
from whit.methods.gptq import GPTQ
from whit.methods.joined import Matrices, Moving, Part, grouped, join
from whit.methods.latent import Latent
from whit.methods.nested import moving_parts
from whit.methods.samples import Samples
from whit.methods.workers import Workers, workers
from whit.named import INF, check_options
from whit.tensor import Format, LayerStats, QuantizedTensor

OPTIMIZERS = ("adam", "sign")
LOSSES = ("relative", "mse")
DECAY = (0.9, 0.95)  # of Adam's two averages


@dataclass(frozen=True)
class BlockDescent:
    """What refinement and block-wise training share: gradient descent from the codes that `start` chooses.

    - `steps` of `batch` samples each.
    - `rate`, `scale_rate`: the lengths of the first step, in steps of the format, for the rounding and for the params
      (0: they stay); both fall linearly to 0.
    - `optimizer`: adam or sign. `loss`: relative or mse.
    - `asymmetric`: the share of the unquantized model's own output in the target; the rest is what the unquantized
      block makes of the quantized model's inputs.
    - `inside`: where in its cell each weight begins, see `Latent`.
    - `checks`: how often the whole calibration set is measured on the way; the best result is kept.
    - `seed`: of the order of samples.

    RecipeError for options that are out of their bounds.
    """

    start: Method = field(default_factory=lambda: GPTQ(refit=True, sweeps=1))
    steps: int = 200
    batch: int = 8
    rate: float = 0.003
    scale_rate: float = 0.003
    optimizer: str = "adam"
    loss: str = "relative"
    asymmetric: float = 1.0
    inside: float = 0.9
    checks: int = 4
    seed: int = 0

    name: ClassVar[str]
    needs_stats: ClassVar[bool] = True
    needs_exact: ClassVar[bool] = True
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        **dict.fromkeys(("steps", "batch", "checks"), (1, INF)),
        **dict.fromkeys(("rate", "scale_rate", "asymmetric"), (0, INF)),
        "inside": (0, 1),
    }

    def __post_init__(self) -> None:
        check_options(self, **self.bounds)
        if not isinstance(self.start, Method) or self.start.name == self.name:
            raise RecipeError(f"{self.name}: start {self.start!r}; it must be another method; use gptq")
        for key, known in (("optimizer", OPTIMIZERS), ("loss", LOSSES)):
            if getattr(self, key) not in known:
                raise RecipeError(f"{self.name}: {key} {getattr(self, key)!r}; it must be one of {', '.join(known)}")

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        """The start: quantize (out, in) by its method."""
        return self.start(weight, stats, format)

    @property
    def at_once(self) -> int:
        return self.batch

    def passes(self, samples: int) -> float:
        return 3 * self.steps * min(self.batch, samples) / samples + self.checks + 1 + (self.asymmetric != 1)

    def refine(
        self, block: Block, weights: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]
    ) -> Mapping[str, QuantizedTensor]:
        """The best of the start and of what is found on the way, in the loss over all samples."""
        device = next(iter(weights.values())).device
        with workers(device) as team:
            shapes = [(name, q.format, (q.codes.shape[0], q.codes.shape[1])) for name, q in quantized.items()]
            groups = grouped(shapes, device)
            latents = list(team.map(lambda names: self._joined(names, weights, quantized), groups))
            samples = Samples(block, device, self._targets(block, team))
            return Descent(self, block, latents, samples, team).run(quantized)

    def _joined(
        self, names: list[str], weights: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]
    ) -> Matrices:
        parts = [Part(name, len(weights[name]), _itself, _itself) for name in names]
        weight = torch.cat([weights[name] for name in names])
        return Matrices(parts, moving_parts(self.moving, weight, join([quantized[name] for name in names])))

    def moving(self, weight: Tensor, quantized: QuantizedTensor) -> Moving:
        """What gradients move of a matrix: what lies behind the codes of the start, and its params."""
        raise NotImplementedError

    def length(self, step: int) -> float:
        """Of step 1, 2, ...: its share of the first step's."""
        return 1 - (step - 1) / self.steps

    @property
    def decay(self) -> tuple[float, float]:
        """Of Adam's two averages."""
        return DECAY

    def _targets(self, block: Block, team: Workers) -> Tensor:
        """(samples, context, hidden): what the refined block should give."""
        if self.asymmetric == 1:
            return block.targets

        def mix(number: int) -> Tensor:
            own, exact = block.forward(block.inputs[number, None])[0], block.targets[number]
            return own.to(exact.device).lerp(exact.to(own.dtype), self.asymmetric)

        mixed = torch.empty_like(block.targets)
        for number, target in enumerate(team.map(mix, range(len(mixed)))):
            mixed[number].copy_(target)
        return mixed


@dataclass(frozen=True)
class Refine(BlockDescent):
    """Gradient descent on the rounding within the cells of the codes that `start` chooses, and on the scales.

    `reach`: how many steps of the format a weight may move. Other options as in `BlockDescent`.
    """

    reach: float = 1.0

    name: ClassVar[str] = "refine"
    weight_bytes: ClassVar[int] = 48  # origin, offset, step, decoded, two averages, a sum of gradients; the best found
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {**BlockDescent.bounds, "reach": (0, INF)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inside == 1:
            raise RecipeError("refine: inside 1; a weight would be in two cells; use less than 1")

    def moving(self, weight: Tensor, quantized: QuantizedTensor) -> Moving:
        """What gradients move: offsets within the cells of the start."""
        return Latent(weight, quantized, self.inside, self.reach)


def _itself(matrix: Tensor) -> Tensor:
    return matrix
