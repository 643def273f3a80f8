"""How fast a loaded model reads a prompt and writes, what it holds, and what energy a token takes.

Prefill: tokens of the prompt / seconds of one forward pass. Decode: tokens / seconds of a greedy loop with a cache at
batch 1. Each is repeated; the median and the extremes are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from whit.report.energy import Meter


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one or more values."""
        return cls(statistics.median(values), min(values), max(values))

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class SpeedOptions:
    """Tokens of the prompt, tokens written after it, and how often."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second; joules per token written, or None and why not."""

    prefill: Spread
    decode: Spread
    joules_per_token: float | None
    energy_note: str


def measure_speed(model: Any, options: SpeedOptions) -> Speed:
    """Time a causal language model on tokens that spread over its vocabulary."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    prompt = max(min(options.prompt_tokens, limit - options.new_tokens), 1)
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(prompt) * 7919 % vocabulary)[None].to(model.device)
    with torch.inference_mode():
        _write(model, ids, min(4, options.new_tokens))  # everything is built and touched once
        prefill = [
            prompt / _seconds(model, lambda: model(input_ids=ids, use_cache=False)) for _ in range(options.repeats)
        ]
        decode, meter = [], Meter(model.device)
        joules = 0.0
        for _ in range(options.repeats):
            seconds, used = _write(model, ids, options.new_tokens, meter)
            decode.append(options.new_tokens / seconds)
            joules += used or 0.0
    per_token = joules / (options.repeats * options.new_tokens) if meter.is_there else None
    return Speed(Spread.of(prefill), Spread.of(decode), per_token, meter.note)


def _seconds(model: Any, action: Any) -> float:
    _wait(model)
    start = time.perf_counter()
    action()
    _wait(model)
    return time.perf_counter() - start


def _write(model: Any, ids: torch.Tensor, count: int, meter: Meter | None = None) -> tuple[float, float | None]:
    """Seconds and joules of writing `count` tokens after the prompt, which is read before the clock starts."""
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    _wait(model)
    before = meter.read() if meter else None
    start = time.perf_counter()
    for _ in range(count):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    _wait(model)
    seconds = time.perf_counter() - start
    after = meter.read() if meter else None
    return seconds, None if before is None or after is None else after - before


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
