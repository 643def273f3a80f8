"""How far a model in memory is from its unquantized self: the KL divergence of its predictions over some samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.calibration.runner import Runner

PROBES = 4096  # tokens over which the divergence is taken
ROWS = 256  # tokens whose distributions are compared at a time
DIGITS = 6  # that are kept: more than the text's own noise leaves, and none that the number of threads could move


@dataclass(frozen=True)
class Probe:
    """Samples whose divergence is taken: `tokens` (n, context) and what the unquantized model predicts, log p."""

    runner: Runner
    tokens: Tensor
    exact: tuple[Tensor, ...]

    def divergence(self, index: int = 0, hidden: Tensor | None = None) -> float:
        """Nats per token of the model as it is now, where `hidden` (n, context, hidden) enters block `index`."""
        found = []
        for number, (row, exact) in enumerate(zip(self.tokens, self.exact, strict=True)):
            entering = None if hidden is None else hidden[number : number + 1]
            found.append(_kl(exact, self.runner.logits(row[None], index, entering)))
        return float(f"{torch.cat(found).double().cpu().numpy().mean():.{DIGITS}g}")


def _kl(exact: Tensor, logits: Tensor) -> Tensor:
    """(context,) nats for log p (context, vocabulary) and the logits of q.

    As sum p (e^d - 1 - d), d = log q - log p: no term is negative, so that small sums are no differences of large ones.
    """
    parts = []
    for p, q in zip(torch.split(exact, ROWS), torch.split(logits, ROWS), strict=True):
        d = log_p(q) - p
        parts.append((p.exp() * (torch.expm1(d) - d)).masked_fill_(p == -torch.inf, 0.0).sum(dim=-1))
    return torch.cat(parts)


def log_p(logits: Tensor) -> Tensor:
    """(n, vocabulary) in nats, float32."""
    return torch.log_softmax(logits.to(torch.float32), dim=-1)
