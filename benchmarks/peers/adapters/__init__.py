"""One file per quantizer: `quantize(job)` gives the weights that its codes stand for and the time it took.

The weights are named and shaped as in the original checkpoint; matrices that are not in decoder layers stay as they
are in every adapter. The time is of the quantizer's own call: the model is loaded, the tokens are at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from catalogue import Row
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """`tokens` int64 (samples, context); `device` cpu or cuda; `options` of the peer."""

    model: Path
    tokens: Tensor
    row: Row
    device: str
    options: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Took:
    """Seconds on the clock, and of all processors together, which other work on the machine does not stretch."""

    seconds: float
    processor_seconds: float


def timed(call: Callable[[], Any]) -> tuple[Any, Took]:
    """What the call gives, and the time it took."""
    start, busy = time.perf_counter(), time.process_time()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, Took(time.perf_counter() - start, time.process_time() - busy)


def load(job: Job, place: bool = True) -> Any:
    """The original model in bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).eval()
    return model.to(job.device) if place else model


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """What all are asked to quantize: the linears of the decoder layers."""
    found = model.named_modules()
    return {name: m for name, m in found if isinstance(m, torch.nn.Linear) and ".layers." in f".{name}"}


def check_weights(original: Weights, weights: Weights, row: Row) -> int:
    """The number of quantized matrices; ValueError where a group has more values than its bits allow, or none has."""
    changed = 0
    for name, before in original.items():
        after = weights[name]
        if after.shape != before.shape or not bool(torch.isfinite(after).all()):
            raise ValueError(f"{name}: {tuple(after.shape)} or not finite; it was {tuple(before.shape)}")
        if not (".layers." in name and before.dim() == 2):
            continue
        groups = after.float().reshape(-1, row.group_size or after.shape[1]).sort(dim=1).values
        values = int((groups.diff(dim=1) != 0).sum(dim=1).max()) + 1
        if values > 1 << row.bits:
            raise ValueError(f"{name}: a group has {values} values; {row} has at most {1 << row.bits}")
        changed += 1
    if changed == 0:
        raise ValueError("no matrix was quantized")
    return changed
