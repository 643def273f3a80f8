"""A short fine-tuning of a tiny model, who listens to it, and what it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import whit
from whit.training.data import Example

TUNING = whit.Tuning(
    "nf4-dq", rank=4, dropout=0.1, steps=6, batch=2, accumulate=2, context=64, holdout=0.2, learning_rate=5e-3,
    evaluate_every=3,
)  # fmt: skip


class Watcher:
    """Keeps what it hears, and may kill the process after a step."""

    def __init__(self, die_after: int | None = None) -> None:
        self.entries: list[Mapping[str, float]] = []
        self.notes: list[str] = []
        self.die_after = die_after

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def step(self, entry: Mapping[str, float], steps: int) -> None:
        self.entries.append(entry)
        if entry["step"] == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def scored(self, entry: Mapping[str, float]) -> None:
        self.entries.append(entry)


def mean_loss(model: Any, examples: Iterable[Example]) -> float:
    """Over the tokens of the responses, each example run alone: what a run's held-out loss has to be."""
    total = count = 0.0
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=example.tokens[None], use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, example.tokens[1:], reduction="none")
        total, count = total + losses[example.trained[1:]].sum().item(), count + example.targets
    return total / count


def adapter(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}
