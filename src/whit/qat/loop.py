"""The loop of end-to-end training: decode every trained parameter, run, and move what lies behind them.

Gradients are taken in the decoded parameters and led from there to their masters one parameter at a time: nothing of
the rounding is kept for the backward pass. On a CPU each window is one thread's from end to end and gradients are added
in order; no byte depends on the number of threads. On a GPU nothing waits for the device within a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from whit.errors import TrainingError
from whit.methods.descent import gradients_in
from whit.methods.nested import moves_weights
from whit.methods.workers import Workers, added, workers
from whit.qat.course import Course
from whit.qat.losses import divergence, hidden_loss, text_loss
from whit.qat.network import Network
from whit.qat.state import StateFile
from whit.qat.trained import Kept, Trained

REPORTS = 50  # times in a run that the loss is asked for
Progress = Callable[[int, int, float], None]


class Loop:
    """`tokens` int64 (windows, context); `trained` by names that stay from run to run; `teacher` where a loss asks."""

    def __init__(
        self, network: Network, teacher: Network | None, trained: Mapping[str, Trained], tokens: Tensor, course: Course
    ) -> None:
        self.network, self.teacher, self.trained, self.course = network, teacher, dict(trained), course
        self.tokens = tokens.to(network.device)
        self.variables = {f"{n}/{key}": v for n, one in self.trained.items() for key, v in one.variables.items()}
        groups = [
            {"params": params, "lr": rate, "base": rate} for rate, params in self._by_rate().items() if params and rate
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, course.slow), eps=1e-20, weight_decay=0.0, fused=network.device.type == "cuda"
        )  # fmt: skip
        self.order = self._order().to(network.device)
        self.step = 0
        self.seconds = 0.0

    def run(self, state: StateFile | None = None, progress: Progress | None = None) -> None:
        """All steps that are left; `state` is read first, and written on the way."""
        if state is not None:
            self.step, self.seconds = state.load(self.variables, self.optimizer)
        total, loss = self.course.steps, torch.zeros((), dtype=torch.float64)
        every = max(total // REPORTS, 1)
        with torch.no_grad(), workers(self.network.device) as team:
            began = time.monotonic() - self.seconds
            while self.step < total and self._done() < 1:
                loss = self._step(team)
                self.step += 1
                self.seconds = time.monotonic() - began
                due = state is not None and (state.due() or self._done() >= 1)
                if due or self.step % every == 0 or self.step in (1, total):
                    self._require_finite(float(loss))
                if progress is not None and (self.step % every == 0 or self.step == total):
                    progress(self.step, total, float(loss))
                if state is not None and due:
                    state.save(self.step, self.seconds, self.variables, self.optimizer)
            for one in self.trained.values():
                one.decode()

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"training: the loss is {loss} by step {self.step}; it must be finite; lower the rates, or check that "
                "the start is finite; what was saved before that step is kept"
            )

    def _done(self) -> float:
        """The share of the run that is over."""
        share = self.step / self.course.steps
        return share if self.course.seconds is None else max(share, self.seconds / self.course.seconds)

    def _step(self, team: Workers) -> Tensor:
        """Moves everything once; the mean loss per token."""
        first = self.step * self.course.batch
        batch = self.tokens[self.order[first : first + self.course.batch]]
        total, sums = self._sums(batch, team)
        for name, gradients in zip(self.trained, team.map(lambda n: self._lead(n, sums), self.trained), strict=True):
            for key, value in gradients.items():
                self.variables[f"{name}/{key}"].grad = value
        self._move()
        return total

    def _sums(self, batch: Tensor, team: Workers) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss per token of a batch (n, context), and its gradients in the decoded parameters."""
        decoded: dict[str, Tensor] = {}
        for some in team.map(lambda one: one.decode(), self.trained.values()):
            decoded |= some
        parts = torch.split(batch, 1 if team.share else self.course.at_once)
        sums: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64, device=self.network.device)
        with self.network.holding(decoded) as leaves:
            del decoded
            for loss, found in team.map(lambda part: self.gradients(part, leaves, batch.numel()), parts):
                total += loss
                for name, gradient in found.items():
                    sums[name] = gradient if len(parts) == 1 else added(sums.get(name), gradient)
        return total, sums

    def _lead(self, name: str, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.trained[name].gradients(sums)

    def _move(self) -> None:
        moved = [v for group in self.optimizer.param_groups for v in group["params"]]
        if self.course.clip:
            torch.nn.utils.clip_grad_norm_(moved, self.course.clip)
        length = self.course.length(self._done())
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * length
        self.optimizer.step()
        for value in self.variables.values():
            value.grad = None
        for one in self.trained.values():
            one.confine()

    def gradients(self, part: Tensor, leaves: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of these windows, as their share of a mean over `tokens`, and its gradients."""
        exact = self.teacher.run(part, self.course.hidden > 0) if self.teacher is not None else None
        with torch.enable_grad():
            loss = self._loss(part, exact) / tokens
            return loss.detach(), gradients_in(leaves, loss)

    def _loss(self, part: Tensor, exact: tuple[Tensor, tuple[Tensor, ...]] | None) -> Tensor:
        course = self.course
        logits, hidden = self.network.run(part, course.hidden > 0)
        vocabulary = logits.shape[-1]
        loss = logits.new_zeros((), dtype=torch.float64)
        if course.distill and exact is not None:
            loss = loss + course.distill * divergence(logits.reshape(-1, vocabulary), exact[0].reshape(-1, vocabulary))
        if course.text:
            ahead = logits[:, :-1].reshape(-1, vocabulary)
            loss = loss + course.text * text_loss(ahead, part[:, 1:].reshape(-1))
        if course.hidden and exact is not None:
            loss = loss + course.hidden * hidden_loss(hidden, exact[1])
        return loss

    def _by_rate(self) -> dict[float, list[Tensor]]:
        course = self.course
        groups: dict[float, list[Tensor]] = {}
        for one in self.trained.values():
            for key, value in one.variables.items():
                rate = course.kept_rate if isinstance(one, Kept) else course.rate
                rate = rate if moves_weights(key) else course.scale_rate
                groups.setdefault(rate, []).append(value)
        return groups

    def _order(self) -> Tensor:
        """The windows of all steps: all in a seeded order, then all in another."""
        generator = torch.Generator().manual_seed(self.course.seed)
        wanted = self.course.steps * self.course.batch
        rounds = -(-wanted // len(self.tokens))
        orders = [torch.randperm(len(self.tokens), generator=generator) for _ in range(rounds)]
        return torch.cat(orders)[:wanted]
