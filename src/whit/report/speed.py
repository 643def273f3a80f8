"""How fast a loaded model reads a prompt and writes, and what energy a token takes: one lap at a time.

Prefill: tokens of the prompt / seconds of the forward pass that fills the cache and gives the first next token.
Decode: tokens / seconds of a greedy loop with that cache at batch 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from whit.report.energy import Meter

FEW = 4  # tokens after which everything is built and touched once


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
    """Tokens of the prompt, tokens written after it, how often; `seconds` of one writing, after which it stops."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 3
    seconds: float = 4.0


@dataclass(frozen=True)
class Lap:
    """Tokens per second read and written; joules per token written, or None where there is no counter."""

    prefill: float
    decode: float
    joules_per_token: float | None

    def to_json(self) -> dict[str, float | None]:
        """Plain numbers."""
        return asdict(self)


def lap(model: Any, options: SpeedOptions, meter: Meter) -> Lap:
    """Time a causal language model once, on tokens that spread over its vocabulary."""
    ids = _prompt(model, options)
    with torch.inference_mode():
        _wait(model)
        start = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        _wait(model)
        read = time.perf_counter() - start
        before = meter.read()
        count, written = _write(model, output, options.new_tokens, options.seconds)
        after = meter.read()
    joules = None if before is None or after is None else (after - before) / count
    return Lap(ids.shape[1] / read, count / written, joules)


def touch(model: Any, options: SpeedOptions) -> None:
    """Read the prompt and write a few tokens, so that everything that a lap needs is built and in memory."""
    with torch.inference_mode():
        output = model(input_ids=_prompt(model, options), use_cache=True, logits_to_keep=1)
        _write(model, output, min(FEW, options.new_tokens), options.seconds)


def _prompt(model: Any, options: SpeedOptions) -> torch.Tensor:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    length = max(min(options.prompt_tokens, limit - options.new_tokens), 1)
    ids: torch.Tensor = (torch.arange(length) * 7919 % config.vocab_size)[None].to(model.device)
    return ids


def _write(model: Any, output: Any, most: int, seconds: float) -> tuple[int, float]:
    """Tokens written, `most` of them or as many as fit into the seconds, and the seconds that they took."""
    start, count = time.perf_counter(), 0
    while count < most and (count == 0 or time.perf_counter() - start < seconds):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        count += 1
    _wait(model)
    return count, time.perf_counter() - start


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
