"""Measuring what was given up: perplexity, divergence from a baseline, zero-shot tasks, bits per weight."""

from whit.evaluation.listener import Listener, Silent
from whit.evaluation.measure import EvaluationOptions, evaluate
from whit.evaluation.result import BaselineResult, EvaluationResult, TaskResult

__all__ = [
    "BaselineResult", "EvaluationOptions", "EvaluationResult", "Listener", "Silent", "TaskResult", "evaluate",
]  # fmt: skip
