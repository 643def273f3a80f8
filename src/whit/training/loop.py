"""The training loop: micro-batches, one update a step, scores on what is held out.

Not transformers' Trainer: there every random number comes from global generators whose states must be saved, and data
order from a sampler that is wound forward. Here a step is a function of the seed, its number, the adapters and the
optimizer; so a resumed run gives the same bytes, and so do several processes, but for the order of their sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from whit.errors import TrainingError
from whit.process import give_back_freed
from whit.randomness import seeded
from whit.training.data import Example
from whit.training.loss import ResponseLoss
from whit.training.optimizers import set_rate
from whit.training.packing import MicroBatch, Step, collate, derive
from whit.training.ranks import Ranks
from whit.training.settings import Tuning

EVALUATIONS = 10  # in a run, where it is not said how often
Entry = Mapping[str, float]


class Watcher(Protocol):
    """Who is told how training goes; the command line draws a bar from this."""

    def note(self, sentence: str) -> None:
        """Something that the user should know."""

    def step(self, entry: Entry, steps: int) -> None:
        """A step is done: its number, loss, learning_rate, gradient_norm, tokens_per_second, memory_bytes and more."""

    def scored(self, entry: Entry) -> None:
        """The held-out examples were scored after `step`: held_out_loss."""


@dataclass(frozen=True)
class Work:
    """Examples and every step over them; those held out and how they are scored; the token that pads."""

    examples: tuple[Example, ...]
    steps: tuple[Step, ...]
    held_out: tuple[Example, ...]
    scored: tuple[MicroBatch, ...]
    pad: int

    def targets(self, step: Step) -> int:
        """Response tokens that a step predicts, on all processes together."""
        return sum(self.examples[i].targets for rows in step for row in rows for i in row)

    def tokens(self, rows: MicroBatch) -> int:
        """Tokens of a micro-batch, what pads it left out."""
        return sum(len(self.examples[i].tokens) for row in rows for i in row)


@dataclass(frozen=True)
class Loop:
    """`model` is transformers' own, with the adapters in it; `memory` says the most bytes held so far."""

    model: Any
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss: ResponseLoss
    work: Work
    tuning: Tuning
    seed: int
    ranks: Ranks
    memory: Callable[[], int]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def steps(self, done: int) -> Iterator[tuple[dict[str, float], ...]]:
        """Run what is left after `done` steps; for each the entries of its log: the step's, and a score's where due."""
        every = self.tuning.evaluate_every or math.ceil(len(self.work.steps) / EVALUATIONS)
        if done == 0 and self.work.scored:
            yield ({"step": 0, "held_out_loss": self.score()},)
        for number in range(done, len(self.work.steps)):
            entries = [self.step(number)]
            if self.work.scored and ((number + 1) % every == 0 or number + 1 == len(self.work.steps)):
                entries.append({"step": number + 1, "held_out_loss": self.score()})
            yield tuple(entries)

    def step(self, number: int) -> dict[str, float]:
        """Gradients of all micro-batches, clipped, and one update."""
        began, step = time.perf_counter(), self.work.steps[number]
        rate = self.tuning.rate(number, len(self.work.steps))
        loss = self.ranks.sum(self.gradients(number))
        self.ranks.sum_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.tuning.clip or math.inf)
        shown_loss, shown_norm = torch.stack([loss, norm.to(loss.dtype)]).tolist()  # the step's one wait for a GPU
        if not (math.isfinite(shown_loss) and math.isfinite(shown_norm)):
            raise TrainingError(
                f"step {number + 1}: loss {shown_loss}, gradient norm {shown_norm}; both must be finite; "
                "use a lower --learning-rate, or a checkpoint whose own loss is finite"
            )
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        seconds, tokens = time.perf_counter() - began, sum(map(self.work.tokens, step))
        return {
            "step": number + 1, "loss": shown_loss, "learning_rate": rate, "gradient_norm": shown_norm,
            "tokens": tokens, "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1),
            "memory_bytes": self.memory(),
        }  # fmt: skip

    def gradients(self, number: int) -> Tensor:
        """Leave this process' share of a step's gradients in the parameters; returns its share of the mean loss."""
        self.model.train()
        for p in self.parameters:
            p.grad = None
        step = self.work.steps[number]
        targets, total = self.work.targets(step), torch.zeros((), device=self.device)
        for index, counts in self.ranks.turns(len(step)):
            with seeded(derive(self.seed, "dropout", number, index), self.device):
                with self._precision():
                    loss = self.loss(self.model, self._batch(step[index], self.work.examples)) / targets * counts
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def score(self) -> float:
        """The mean loss of the held-out response tokens."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad(), self._precision():
            for index, counts in self.ranks.turns(len(self.work.scored)):
                total += self.loss(self.model, self._batch(self.work.scored[index], self.work.held_out)) * counts
        self.model.train()
        give_back_freed()  # shapes of its own: what the next steps ask for would lie beside it
        return float(self.ranks.sum(total)) / sum(e.targets for e in self.work.held_out)

    def trial(self) -> float:
        """Seconds that all steps will take, by the fullest micro-batch, forward and backward; nothing is updated."""
        every = [rows for step in self.work.steps for rows in step]
        fullest = max(every, key=self.work.tokens)
        self.model.train()
        with seeded(self.seed, self.device):
            for _ in range(2 if self.device.type == "cuda" else 1):  # the first one compiles kernels
                began = time.perf_counter()
                with self._precision():
                    loss = self.loss(self.model, self._batch(fullest, self.work.examples))
                loss.backward()  # type: ignore[no-untyped-call]
                loss.item()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        for p in self.parameters:
            p.grad = None
        give_back_freed()
        share = sum(map(self.work.tokens, every)) / self.work.tokens(fullest)
        return seconds * share / self.ranks.size

    def _batch(self, rows: MicroBatch, examples: tuple[Example, ...]) -> Any:
        return collate(rows, examples, self.work.pad).to(self.device)

    def _precision(self) -> torch.autocast:
        half = self.model.get_input_embeddings().weight.dtype == torch.bfloat16  # packed parameters say nothing of it
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)
