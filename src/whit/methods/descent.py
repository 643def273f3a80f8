"""The descent of block-wise refinement and training: step by step, over all matrices of a block together.

A step decodes the matrices, runs a batch of samples forward and back, and moves what lies behind the codes by Adam or
by signs. On a GPU a step of a small block is hundreds of small kernels, and the processor that launches them is the
bottleneck; there a step is recorded once as a CUDA graph and replayed, where nothing in it waits for the device. That
is tried beforehand, on the gradients alone; a mixture of experts, whose tokens are counted on the host, is not
recorded and gives the same by plain launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from whit.calibration.storage import at_once
from whit.methods.base import Block
from whit.methods.joined import Matrices
from whit.methods.samples import Samples
from whit.methods.workers import Workers, added
from whit.tensor import QuantizedTensor

EPSILON = 1e-20  # only to divide by no zero: what moves has no scale of its own
PLAIN = 2  # steps that are launched before one is recorded: they make whatever torch makes at first use
LEAST = 8  # steps that a recording pays for
Pace: TypeAlias = "tuple[float, float, float] | Tensor"


class Settings(Protocol):
    """What `Refine` and `Blocks` say of their descent."""

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def scale_rate(self) -> float: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def loss(self) -> str: ...
    @property
    def checks(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def decay(self) -> tuple[float, float]: ...

    def length(self, step: int) -> float:
        """Of step 1, 2, ...: its share of the first step's."""
        ...


class Recorded:
    """A step over `numbers` (n,) int64 at a pace (3,), as a CUDA graph: both are copied in, and it is replayed."""

    def __init__(self, step: Callable[[Tensor, Tensor], None], numbers: Tensor) -> None:
        self._numbers, self._pace = numbers.clone(), torch.zeros(3, device=numbers.device)
        self._graph = torch.cuda.CUDAGraph()
        # Files are read by other threads meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            step(self._numbers, self._pace)

    def replay(self, numbers: Tensor, pace: Tensor) -> None:
        """Do the step."""
        self._numbers.copy_(numbers)
        self._pace.copy_(pace)
        self._graph.replay()


class Descent:
    """The loop over the steps, for one block."""

    def __init__(
        self, method: Settings, block: Block, latents: list[Matrices], samples: Samples, team: Workers
    ) -> None:
        self.method, self.block, self.latents, self.samples, self.team = method, block, latents, samples, team
        self.averages = [
            {key: (torch.zeros_like(v), torch.zeros_like(v)) for key, v in latent.variables.items()}
            for latent in latents
        ]
        self._recorded: Recorded | None = None

    def run(self, start: Mapping[str, QuantizedTensor]) -> Mapping[str, QuantizedTensor]:
        """All steps; returns the best that was met."""
        method = self.method
        best, least = start, self.loss(start)
        near = self.samples.device if self.samples.resident else "cpu"
        paces, batches = self._paces(), torch.stack(list(self._batches())).to(near)
        for step, numbers in enumerate(batches, 1):
            if step == PLAIN + 1 and method.steps >= PLAIN + LEAST:
                self._recorded = self._record(numbers)
            self.step(numbers, paces[step - 1])
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
        everything = torch.arange(self.samples.count, device=self.samples.device if self.samples.resident else "cpu")
        size = 1 if self.team.share else max(self.method.batch, at_once(self.block.inputs, self.samples.device))
        with self._holding(decoded):
            losses = list(self.team.map(self._loss_of, torch.split(everything, size)))
        return float(torch.stack(losses).sum())

    def step(self, numbers: Tensor, pace: Pace) -> None:
        """Move everything once, by the gradient over the samples of these numbers."""
        if self._recorded is not None and isinstance(pace, Tensor):
            self._recorded.replay(numbers, pace)
        else:
            self._move(self._sums(numbers), pace)

    def _paces(self) -> Sequence[Pace]:
        """Of each step: its lengths for weights and for params, and what Adam's second average is divided by.

        Floats on a CPU; on a GPU a tensor of float32 rows, which recorded and plain steps read alike.
        """
        method, (slow, slower) = self.method, self.method.decay
        found = []
        for step in range(1, method.steps + 1):
            share = method.length(step) / (1 - slow**step if method.optimizer == "adam" else 1)
            found.append((method.rate * share, method.scale_rate * share, 1 - slower**step))
        return torch.tensor(found, device=self.samples.device).unbind() if self.samples.device.type == "cuda" else found

    def _sums(self, numbers: Tensor) -> dict[str, Tensor]:
        """The gradients over the samples of these numbers in the decoded matrices."""
        decoded = self._decode()
        sums: dict[str, Tensor] = {}
        with self._holding(decoded) as leaves:
            parts = self._parts(numbers)
            for part in self.team.map(lambda part: self._gradients(part, leaves), parts):
                for name, gradient in part.items():
                    sums[name] = gradient if len(parts) == 1 else added(sums.get(name), gradient)
        return sums

    def _move(self, sums: Mapping[str, Tensor], pace: Pace) -> None:
        weights, params, size = pace

        def move(number: int) -> None:
            latent, averages = self.latents[number], self.averages[number]
            for key, gradient in latent.gradients(sums).items():
                self._update(latent.variables[key], gradient, averages[key], params if key else weights, size)
            latent.confine()

        list(self.team.map(move, range(len(self.latents))))

    def _update(
        self, value: Tensor, gradient: Tensor, averages: tuple[Tensor, Tensor], rate: float | Tensor,
        size: float | Tensor,
    ) -> None:  # fmt: skip
        if self.method.optimizer == "sign":
            value.sub_(gradient.sign_().mul_(rate))
            return
        (first, second), (slow, slower) = averages, self.method.decay
        first.lerp_(gradient, 1 - slow)
        second.lerp_(gradient.square_(), 1 - slower)
        value.sub_((second / size).sqrt_().add_(EPSILON).reciprocal_().mul_(first).mul_(rate))

    def _record(self, numbers: Tensor) -> Recorded | None:
        """A step as a graph, where nothing in it waits for the device; tried on gradients, which move nothing."""
        if self.samples.device.type != "cuda" or not self.samples.resident:
            return None
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sums = self._sums(numbers)
            for latent in self.latents:
                latent.gradients(sums)
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return Recorded(lambda n, pace: self._move(self._sums(n), pace), numbers)

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
            return gradients_in(leaves, self._loss_of(numbers))

    def _loss_of(self, numbers: Tensor) -> Tensor:
        """The sum over all tokens of these samples."""
        inputs, targets = self.samples.take(numbers)
        targets = targets.to(torch.float32)
        # A sum over the hidden dimension, not a mean, whose gradient float16 could not hold.
        error = (self.block.forward(inputs).to(torch.float32) - targets).square().sum(dim=-1)
        if self.method.loss == "relative":
            error = error / targets.square().mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        return error.sum(dtype=torch.float64)


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


def gradients_in(leaves: Mapping[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """A loss's gradients in leaves, by name; zeros where it does not reach: an expert may see no token."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in pairs}
