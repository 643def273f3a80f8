"""How fast a model reads a prompt and writes tokens here, beside the machine's limits and other programs.

Contenders take turns within each round, so that all see the same noise. Decoding has to read every weight once per
token: its limit is the bytes of the weights over the read bandwidth. A prompt's limit is the longer of that and its
multiplications as bfloat16.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from whit.compiled import compile
from whit.errors import EvaluationError
from whit.evaluation.kernel_speed import Limits

SAMPLE = 1000  # of the vocabulary, from which prompts are drawn


class Contender(Protocol):
    """Something that runs the model: seconds for a prompt of so many tokens, and for `new` tokens after one."""

    nbytes: int

    def prefill(self, tokens: int) -> float: ...
    def decode(self, prompt: int, new: int) -> float: ...


@dataclass(frozen=True)
class ModelSpeed:
    """One measured case: the median of its rounds; `share_of_limit` is 1 at the machine's limit."""

    kernel: str
    phase: str
    tokens: int
    seconds: float
    tokens_per_second: float
    bytes: int
    ratio_to_bf16: float | None
    share_of_limit: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Transformers:
    """A model through its own `generate`, compiled or not. It is the caller's, and changed by compiling only."""

    def __init__(self, model: Any, compiled: bool) -> None:
        self.model = model
        self.nbytes = weight_bytes(model)
        self.generate: Any = getattr(model.generate, "uncompiled", model.generate)
        if compiled:
            self.generate = compile(model, strict=True).generate

    def prefill(self, tokens: int) -> float:
        return self._timed(tokens, 1)

    def decode(self, prompt: int, new: int) -> float:
        return self._timed(prompt, new + 1) - self._timed(prompt, 1)

    def _timed(self, prompt: int, new: int) -> float:
        config = self.model.generation_config
        stops, config.eos_token_id = config.eos_token_id, None
        ids = prompt_tokens(prompt, self.model.config.vocab_size)
        try:
            start = time.perf_counter()
            found = self.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
            took = time.perf_counter() - start
        finally:
            config.eos_token_id = stops
        if found.shape[1] != prompt + new:
            raise EvaluationError(
                f"bench: {found.shape[1] - prompt} tokens came; it must be {new}; use a longer context"
            )
        return took


class LlamaCpp:
    """A GGUF file through llama.cpp, from PyPI's `xllamacpp`, with its own clock; it repacks weights as it likes."""

    def __init__(self, path: Path, threads: int, context: int = 1024) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(path), context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.nbytes = path.stat().st_size
        self.server = xllamacpp.Server(params)

    def prefill(self, tokens: int) -> float:
        return float(self._timings(tokens, 1)["prompt_ms"]) / 1e3

    def decode(self, prompt: int, new: int) -> float:
        found = self._timings(prompt, new + 1)  # the first comes with the prompt
        return float(found["predicted_ms"]) / 1e3 * new / int(found["predicted_n"])

    def _timings(self, prompt: int, new: int) -> Mapping[str, Any]:
        found = self.server.handle_completions(
            {
                "prompt": prompt_tokens(prompt, SAMPLE), "n_predict": new, "cache_prompt": False, "ignore_eos": True,
                "temperature": 0, "top_k": 1,
            }
        )  # fmt: skip
        timings: Mapping[str, Any] = found["timings"]
        return timings


def has_llama_cpp() -> bool:
    """Whether PyPI's `xllamacpp` is installed."""
    return find_spec("xllamacpp") is not None


def prompt_tokens(count: int, vocabulary: int) -> list[int]:
    """The same random tokens for every contender."""
    random = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randint(5, min(vocabulary, SAMPLE), (count,), generator=random).tolist()
    return drawn


def weight_bytes(model: Any) -> int:
    """What a token reads: every tensor once, but of an embedding that is not the head too nothing worth counting."""
    head = _tensor_bytes(model.get_output_embeddings())
    looked_up = _tensor_bytes(model.get_input_embeddings()) if head else {}
    return sum(_tensor_bytes(model).values()) - sum(size for at, size in looked_up.items() if at not in head)


def _tensor_bytes(module: nn.Module) -> dict[int, int]:
    """Sizes by address."""
    return {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers()) if t.numel()}


def measure_model(
    contenders: Mapping[str, Contender], parameters: int, limits: Limits, prompt: int, new: int, rounds: int
) -> list[ModelSpeed]:
    """Prefill of 512 and of `prompt` tokens, and `new` tokens after `prompt`; the contender `bf16` is the base."""
    cases = [("prefill", 512), ("prefill", prompt), ("decode", new)]
    seconds: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for name, one in contenders.items():
            for phase, tokens in cases:
                took = one.prefill(tokens) if phase == "prefill" else one.decode(prompt, tokens)
                if turn:  # the first one warms up
                    seconds.setdefault((name, phase, tokens), []).append(took)
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    return [_speed(case, medians, contenders[case[0]].nbytes, parameters, limits) for case in medians]


def _speed(
    case: tuple[str, str, int],
    medians: Mapping[tuple[str, str, int], float],
    nbytes: int,
    parameters: int,
    limits: Limits,
) -> ModelSpeed:
    name, phase, tokens = case
    took, plain = medians[case], medians.get(("bf16", phase, tokens))
    read = nbytes / limits.read_bytes_per_second
    floor = tokens * read if phase == "decode" else max(read, 2 * parameters * tokens / limits.matmul_flops)
    return ModelSpeed(name, phase, tokens, took, tokens / took, nbytes, plain and plain / took, floor / took)


HEADER = ("model", "phase", "tokens", "tokens/s", "x bf16", "of the limit")


def table(speeds: Sequence[ModelSpeed]) -> list[tuple[str, ...]]:
    """Lines for a table under HEADER."""
    return [
        (
            s.kernel, s.phase, str(s.tokens), f"{s.tokens_per_second:.1f}",
            "" if s.ratio_to_bf16 is None else f"{s.ratio_to_bf16:.2f}", f"{100 * s.share_of_limit:.0f} %",
        )
        for s in speeds
    ]  # fmt: skip
