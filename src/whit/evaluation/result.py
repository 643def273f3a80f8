"""What an evaluation found: one value, and the JSON object that `whit evaluate --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of one task; `metric` says which of the harness's metrics it is; no error for a single item."""

    accuracy: float
    stderr: float | None
    items: int
    metric: str

    def to_json(self) -> dict[str, Any]:
        """The object under "tasks"."""
        return {"accuracy": self.accuracy, "stderr": self.stderr, "items": self.items}


@dataclass(frozen=True)
class BaselineResult:
    """Against a baseline: its perplexity, KL divergence in nats per token, how often the first choices agree."""

    name: str
    perplexity: float
    kl_mean: float
    kl_ci95: tuple[float, float]
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of one model. `tokens` counts the predicted tokens: windows x (context - 1)."""

    model: str
    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    context: int
    bits_per_weight: float
    size_bytes: int
    baseline: BaselineResult | None = None
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object of `whit evaluate --json`; what was not measured is null."""
        against = self.baseline
        return {
            "model": self.model,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "context": self.context,
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            "baseline": against and {"perplexity": against.perplexity},
            "kl": against and {"mean": against.kl_mean, "ci95": list(against.kl_ci95), "p99": against.kl_p99},
            "top1_agreement": against and against.top1_agreement,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
        }
