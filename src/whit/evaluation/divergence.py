"""How far a model's next-token distributions lie from its baseline's.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v)),   p the baseline, q the model, one figure a predicted token

A baseline is anything that hands out its logits for a batch: a live model, or logits stored by an earlier pass.
Stored logits keep the baseline's own dtype, so both ways give the same figures bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from whit.errors import EvaluationError
from whit.evaluation.listener import Listener
from whit.evaluation.perplexity import batches, called, next_token_logits, predicted, require_finite, row_chunks


class Baseline(Protocol):
    """Hands out the baseline's next-token logits for a batch of windows; `name` is for errors."""

    @property
    def name(self) -> str: ...

    def logits(self, index: int, batch: Tensor) -> Tensor:
        """[windows * predicted, vocabulary] for batch number `index`, in the baseline's own dtype."""


@dataclass(frozen=True)
class LiveBaseline:
    """A baseline model that is in memory beside the model under test."""

    model: Any

    @property
    def name(self) -> str:
        return called(self.model)

    def logits(self, index: int, batch: Tensor) -> Tensor:
        """Run the baseline on the batch."""
        return next_token_logits(self.model, batch)


@dataclass(frozen=True)
class Divergence:
    """Per-token figures, each [windows, predicted] on the CPU: losses and kl float64, agreement bool."""

    losses: Tensor
    baseline_losses: Tensor
    kl: Tensor
    agreement: Tensor


def compare_windows(model: Any, baseline: Baseline, windows: Tensor, listener: Listener) -> Divergence:
    """Score the windows with both and compare. Raises EvaluationError on NaN or on other vocabularies."""
    on_gpu = model.device.type == "cuda"
    return compare_all({called(model): partial(next_token_logits, model)}, baseline, windows, on_gpu, listener)[0]


def compare_all(
    runs: Mapping[str, Callable[[Tensor], Tensor]],
    baseline: Baseline,
    windows: Tensor,
    on_gpu: bool,
    listener: Listener,
) -> tuple[Divergence, ...]:
    """Several models beside one baseline, which runs once: each of `runs`, by a name, gives a batch's logits of the
    next tokens."""
    found: list[list[Tensor]] = [[] for _ in runs]
    done = 0
    for index, batch in enumerate(batches(windows, on_gpu)):
        reference = baseline.logits(index, batch)
        targets = predicted(reference, batch)
        for (name, run), figures in zip(runs.items(), found, strict=True):
            figures.append(_compare(run(batch), reference, targets).reshape(4, batch.shape[0], -1))
            require_finite(figures[-1][0], name)
            require_finite(figures[-1][1], baseline.name)
            require_finite(figures[-1][2], name)
        done += batch.shape[0]
        listener.step("comparison", done, windows.shape[0], batch.numel() * len(runs))
    return tuple(_joined(figures) for figures in found)


def _joined(figures: Sequence[Tensor]) -> Divergence:
    losses, baseline_losses, kl, agreement = torch.cat(list(figures), dim=1)
    return Divergence(losses, baseline_losses, kl, agreement.bool())


def _compare(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """[4, rows] float64: loss, baseline loss, KL, agreement; logits and reference [rows, vocabulary]."""
    if logits.shape[1] != reference.shape[1]:
        raise EvaluationError(
            f"baseline: its vocabulary is {reference.shape[1]} tokens and the model's is {logits.shape[1]}; "
            "they must be equal; compare with the model that this one was made from"
        )
    if len(logits) != len(reference):
        raise EvaluationError(
            f"baseline: predicts {len(reference)} of a batch's tokens, the model {len(logits)}; both must read texts "
            "in one way; compare with the model that this one was made from"
        )
    targets = targets.to(logits.device)
    parts = []
    for rows in row_chunks(*logits.shape):
        q = torch.log_softmax(logits[rows].float(), dim=-1)
        p = torch.log_softmax(reference[rows].to(logits.device).float(), dim=-1)
        target = targets[rows, None]
        agree = (q.argmax(dim=-1) == p.argmax(dim=-1)).float()
        loss, baseline_loss = -q.gather(1, target).squeeze(1), -p.gather(1, target).squeeze(1)
        weight = p.exp()
        # a token that the baseline rules out (-inf) has weight 0 and adds 0, where 0 * inf would be NaN
        kl = (p.sub_(q).mul_(weight)).masked_fill_(weight == 0, 0.0).sum(dim=-1)
        parts.append(torch.stack([loss, baseline_loss, kl, agree]))
    return torch.cat(parts, dim=1).double().cpu()
