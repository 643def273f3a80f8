"""Run in whit's environment: the one evaluator for all; perplexity and divergence from the original model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whit.evaluation import EvaluationOptions, evaluate


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the checkpoint `task["out"]` on every text of `task["texts"]` (name to path)."""
    found = {}
    for name, text in task["texts"].items():
        options = EvaluationOptions(
            baseline=task["model"],
            text=text,
            context=task["context"],
            max_tokens=task["max_tokens"],
            device=task["device"],
            dtype="bfloat16",
        )
        result = evaluate(str(Path(task["out"])), options)
        assert result.baseline is not None
        found[name] = {
            "perplexity": result.perplexity,
            "kl": result.baseline.kl_mean,
            "kl_p99": result.baseline.kl_p99,
            "top1": result.baseline.top1_agreement,
            "baseline_perplexity": result.baseline.perplexity,
            "tokens": result.tokens,
        }
    return {"scores": found}
