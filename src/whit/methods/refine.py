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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from whit.errors import RecipeError
from whit.methods.base import Block, Method
from whit.methods.gptq import GPTQ
from whit.methods.joined import Matrices, Moving, Part, grouped, join
from whit.methods.latent import Latent
from whit.methods.workers import Workers, workers
from whit.tensor import Format, LayerStats, QuantizedTensor

OPTIMIZERS = ("adam", "sign")
LOSSES = ("relative", "mse")
DECAY = (0.9, 0.95)  # of Adam's two averages
EPSILON = 1e-20  # only to divide by no zero: what moves has no scale of its own
RESIDENT = 3  # the samples lie on a GPU when they take less than the free memory by this factor


@dataclass(frozen=True)
class Refine:
    """Gradient descent from the codes that `start` chooses.

    `steps` on `batch` samples each; `rate` and `scale_rate` are the first steps' lengths, in steps of the format, for
    the rounding and for its params (0: they stay); both fall to 0 in a line. `optimizer`: adam or sign. `loss`:
    relative or mse. `asymmetric`: the share of the unquantized model's own output in what should be met, the rest is
    what the unquantized block makes of the quantized model's inputs. `reach`: how many steps a weight may move.
    `inside`: where in its cell each begins, see `Latent`.
    """

    start: Method = field(default_factory=lambda: GPTQ(refit=True, sweeps=1))
    steps: int = 200
    batch: int = 8
    rate: float = 0.003
    scale_rate: float = 0.003
    optimizer: str = "adam"
    loss: str = "relative"
    asymmetric: float = 1.0
    reach: float = 1.0
    inside: float = 0.9
    checks: int = 4
    seed: int = 0

    name: ClassVar[str] = "refine"
    needs_stats: ClassVar[bool] = True
    needs_exact: ClassVar[bool] = True
    weight_bytes: ClassVar[int] = 48  # origin, offset, step, decoded, two averages, a sum of gradients; the best found

    def __post_init__(self) -> None:
        self._check()
        if not self.inside < 1:
            raise RecipeError(f"refine: inside {self.inside}; a weight at 1 is in two cells; use less than 1")

    def _check(self) -> None:
        if not isinstance(self.start, Method) or self.start.name == self.name:
            raise RecipeError(f"{self.name}: start {self.start!r}; it must be another method; use gptq")
        for key, known in (("optimizer", OPTIMIZERS), ("loss", LOSSES)):
            if getattr(self, key) not in known:
                raise RecipeError(f"{self.name}: {key} {getattr(self, key)!r}; it must be one of {', '.join(known)}")
        for key in ("rate", "scale_rate", "asymmetric", "reach", "inside"):
            if not getattr(self, key) >= 0:
                raise RecipeError(
                    f"{self.name}: {key} {getattr(self, key)}; it may not be negative; correct the recipe"
                )
        for key in ("steps", "batch", "checks"):
            if getattr(self, key) < 1:
                raise RecipeError(f"{self.name}: {key} {getattr(self, key)}; it must be at least 1; correct the recipe")

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
            samples = _Samples(block, device, self._targets(block, team))
            descent = _Descent(self, block, latents, samples, team)
            return descent.run(quantized)

    def _joined(
        self, names: list[str], weights: Mapping[str, Tensor], quantized: Mapping[str, QuantizedTensor]
    ) -> Matrices:
        parts = [Part(name, len(weights[name]), _itself, _itself) for name in names]
        weight = torch.cat([weights[name] for name in names])
        return Matrices(parts, self.moving(weight, join([quantized[name] for name in names])))

    def moving(self, weight: Tensor, quantized: QuantizedTensor) -> Moving:
        """What gradients move: offsets within the cells of the start."""
        return Latent(weight, quantized, self.inside, self.reach)

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


class _Samples:
    """Inputs and targets, near the device: on it where they fit, otherwise sent in time and without waiting."""

    def __init__(self, block: Block, device: torch.device, targets: Tensor) -> None:
        self.device, self.count = device, len(targets)
        self._inputs, self._targets = block.inputs, targets
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if RESIDENT * (block.inputs.nbytes + targets.nbytes) < free:
                self._inputs, self._targets = block.inputs.to(device), targets.to(device)

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and targets of these samples (n,), each (n, context, hidden) on the device."""
        return self._send(self._inputs, numbers), self._send(self._targets, numbers)

    def _send(self, samples: Tensor, numbers: Tensor) -> Tensor:
        if samples.device == self.device:
            return samples[numbers.to(self.device, non_blocking=True)]
        return samples[numbers].pin_memory().to(self.device, non_blocking=True)


class _Descent:
    """The loop over the steps, for one block."""

    def __init__(self, method: Refine, block: Block, latents: list[Matrices], samples: _Samples, team: Workers) -> None:
        self.method, self.block, self.latents, self.samples, self.team = method, block, latents, samples, team
        self.averages = [
            {key: (torch.zeros_like(v), torch.zeros_like(v)) for key, v in latent.variables.items()}
            for latent in latents
        ]

    def run(self, start: Mapping[str, QuantizedTensor]) -> Mapping[str, QuantizedTensor]:
        """All steps; returns the best that was met."""
        method = self.method
        best, least = start, self.loss(start)
        for step, numbers in enumerate(self._batches(), 1):
            self.step(step, numbers)
            if step * method.checks // method.steps > (step - 1) * method.checks // method.steps:
                self._decode()
                found = {name: value for latent in self.latents for name, value in latent.values().items()}
                loss = self.loss(found)
                if loss < least:
                    best, least = found, loss
        return best

    def loss(self, quantized: Mapping[str, QuantizedTensor]) -> float:
        """Over all samples, in order."""
        decoded = {name: value.format.decode(value.codes, value.params) for name, value in quantized.items()}
        everything = torch.arange(self.samples.count)
        with self._holding(decoded):
            losses = list(self.team.map(self._loss_of, self._parts(everything)))
        return float(torch.stack(losses).sum())

    def step(self, step: int, numbers: Tensor) -> None:
        """Move everything once, by the gradient over the samples of these numbers."""
        decoded = self._decode()
        with self._holding(decoded) as leaves:
            parts = self._parts(numbers)
            sums: dict[str, Tensor] = {}
            for part in self.team.map(lambda part: self._gradients(part, leaves), parts):
                for name, gradient in part.items():
                    sums[name] = gradient if len(parts) == 1 else _added(sums.get(name), gradient)

        def move(number: int) -> None:
            latent, averages = self.latents[number], self.averages[number]
            for key, gradient in latent.gradients(sums).items():
                rate = self.method.scale_rate if key else self.method.rate
                rate *= self.method.length(step)
                self._update(latent.variables[key], gradient, averages[key], step, rate)
            latent.confine()

        list(self.team.map(move, range(len(self.latents))))

    def _update(self, value: Tensor, gradient: Tensor, averages: tuple[Tensor, Tensor], step: int, rate: float) -> None:
        if self.method.optimizer == "sign":
            value.sub_(gradient.sign_(), alpha=rate)
            return
        (first, second), (slow, slower) = averages, self.method.decay
        first.lerp_(gradient, 1 - slow)
        second.lerp_(gradient.square_(), 1 - slower)
        size = (second / (1 - slower**step)).sqrt_().add_(EPSILON)
        value.addcdiv_(first, size, value=-rate / (1 - slow**step))

    def _batches(self) -> Iterator[Tensor]:
        """The samples of each step: all in a seeded order, then all in another."""
        generator = torch.Generator().manual_seed(self.method.seed)
        batch = min(self.method.batch, self.samples.count)
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(self.method.steps):
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(self.samples.count, generator=generator)])
            yield left[:batch]
            left = left[batch:]

    def _parts(self, numbers: Tensor) -> list[Tensor]:
        """What is run at once: single samples where they are shared out, otherwise batches."""
        return list(torch.split(numbers, 1 if self.team.share else self.method.batch))

    def _decode(self) -> dict[str, Tensor]:
        found = self.team.map(lambda latent: latent.decode(), self.latents)
        return {name: value for some in found for name, value in some.items()}

    @contextmanager
    def _holding(self, decoded: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The block computes with these weights; yields them, rounded to its dtype, to take gradients in."""
        leaves = {name: value.to(self.block.parameters[name].dtype).detach() for name, value in decoded.items()}
        with torch.enable_grad():
            views = {
                id(self.block.parameters[name]): self.block.shaped[name](leaf.requires_grad_())
                for name, leaf in leaves.items()
            }
        with replaced(self.block.module, views):
            yield leaves

    def _gradients(self, numbers: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.enable_grad():
            loss = self._loss_of(numbers)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)  # an expert may see no token
        pairs = zip(leaves.items(), found, strict=True)
        return {name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in pairs}

    def _loss_of(self, numbers: Tensor) -> Tensor:
        """The sum over all tokens of these samples."""
        inputs, targets = self.samples.take(numbers)
        targets = targets.to(torch.float32)
        # A sum over the hidden dimension, not a mean, whose gradient float16 could not hold.
        error = (self.block.forward(inputs).to(torch.float32) - targets).square().sum(dim=-1)
        if self.method.loss == "relative":
            error = error / targets.square().mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        return error.sum(dtype=torch.float64)


def _itself(matrix: Tensor) -> Tensor:
    return matrix


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part.to(torch.float32) if total is None else total.add_(part)


@contextmanager
def replaced(module: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Tensors in the places of parameters, which are known by their identity."""
    before = [
        (owner._parameters, key, parameter)
        for owner in module.modules()
        for key, parameter in owner._parameters.items()
        if id(parameter) in tensors
    ]
    for store, key, parameter in before:
        store[key] = tensors[id(parameter)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for store, key, parameter in before:
            store[key] = parameter
