"""What benchmarks/budget.py does in other processes: measure the harm of formats, and make and score one model.

Models are scored in float32 with their weights dequantized, so that the figures are those of the formats alone.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit import Calibration, Options, Recipe
from whit.allocation import Group, measured
from whit.allocation.space import methods_of
from whit.data import resolve_model, resolve_text
from whit.evaluation.divergence import LiveBaseline, compare_windows
from whit.evaluation.listener import Silent
from whit.evaluation.size import weight_files
from whit.evaluation.statistics import blocks
from whit.evaluation.text import cut_windows, read_text, tokenize
from whit.formats import parse_format
from whit.integrations.loading import load_causal_lm, load_tokenizer
from whit.methods import GPTQ, parse_method
from whit.pipeline import quantize
from whit.pipeline.importance import measure_importance, write_imatrix
from whit.pipeline.job import Job, open_source, prepare
from whit.recipe import split_methods
from whit.tensor import LayerStats


@dataclass(frozen=True)
class Setting:
    """What all cells share."""

    model: str
    text: str
    calibration: str
    samples: int
    context: int
    max_tokens: int | None
    device: str
    method: str
    scratch: str

    @property
    def tokens(self) -> Calibration:
        return Calibration(self.calibration, self.samples, self.context, 0)


def undecided(s: Setting) -> Job:
    """The job that a budget starts from."""
    recipe = Recipe(method_of(s), [("*", "bf16")])
    tokens = s.tokens if recipe.needs_stats else None
    return prepare(s.model, Path(s.scratch) / "none", recipe, Options(device=s.device), tokens)


def method_of(s: Setting) -> Any:
    """The method by name; gptq+ also refines scales and codes."""
    return GPTQ(refit=True, sweeps=1) if s.method == "gptq+" else s.method


def check(s: Setting, specs: list[str]) -> dict[str, str]:
    """Formats in which the method loses more on the device than on the processor, or fails; and why."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 512, generator=draw) @ torch.randn(512, 512, generator=draw) / 16
    weight, stats = torch.randn(96, 512, generator=draw), LayerStats(inputs.T @ inputs, len(inputs))
    wrong = {}
    for spec in specs:
        rules, named = split_methods([("*", spec)])
        method, format = parse_method(named[0][1] if named else method_of(s)), parse_format(rules[0][1])
        try:
            lost = []
            for device in ("cpu", s.device):
                there = LayerStats(stats.hessian.to(device), stats.token_count)
                near = method(weight.to(device), there, format).dequantize().cpu()
                lost.append(float(((near - weight) @ inputs.T).square().sum()))
            if not lost[1] <= 1.1 * lost[0]:
                wrong[spec] = f"loses {lost[1]:.4g} there and {lost[0]:.4g} on the processor"
        except Exception as error:
            wrong[spec] = f"{type(error).__name__}: {error}"
    return wrong


def measure(s: Setting, how: str, wanted: dict[str, list[str]], ladder: list[str]) -> dict[str, Any]:
    """Errors by group (`Group.name`) and format (led by the method, where several were tried), and the
    seconds they took."""
    torch.set_num_threads(1)
    start = time.monotonic()
    job = undecided(s)
    tokens = job.calibration or s.tokens.tokens(load_tokenizer(resolve_model(s.model)))
    formats = {name: tuple(parse_format(f) for f in specs) for name, specs in wanted.items()}
    groups = measured(job, tokens.tokens, formats, how, methods_of(job, ladder))  # type: ignore[arg-type]
    release()
    errors = {
        g.name: {f"{g.methods[f].name}:{f}" if f in g.methods else str(f): e for f, e in g.errors.items()}
        for g in groups
    }
    return {"errors": errors, "seconds": time.monotonic() - start}


def groups_of(errors: dict[str, dict[str, float]]) -> tuple[Group, ...]:
    """The inverse of what `measure` says."""
    groups = []
    for names, found in errors.items():
        methods = {parse_format(f.rpartition(":")[2]): parse_method(f.rpartition(":")[0]) for f in found if ":" in f}
        values = {parse_format(f.rpartition(":")[2]): error for f, error in found.items()}
        groups.append(Group.named(names, values, methods))
    return tuple(groups)


def make(s: Setting, label: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """A row: the recipe's model written in whit's own format, and scored."""
    torch.set_num_threads(1)
    out = Path(s.scratch) / f"{os.getpid()}-{label}"
    asked = Recipe.from_dict(recipe)
    asked = Recipe(method_of(s), asked.rules, methods=asked.methods)
    calibration = s.tokens if asked.needs_stats else None
    start = time.monotonic()
    quantize(s.model, out, asked, calibration=calibration, options=Options(device=s.device, restart=True))
    release()
    row = _scored(s, out, time.monotonic() - start)
    shutil.rmtree(out)
    return row


def importance(s: Setting) -> str:
    """llama.cpp's importance matrix of the calibration text."""
    torch.set_num_threads(1)
    path = Path(s.scratch) / f"{os.getpid()}-imatrix.dat"
    path.unlink(missing_ok=True)
    device = "cuda" if torch.cuda.is_available() and s.device != "cpu" else "cpu"
    write_imatrix(measure_importance(s.model, s.tokens, device), path)
    return str(path)


def mix(s: Setting, name: str, imatrix: str) -> dict[str, Any]:
    """A row: one of llama.cpp's mixes, by its rules, with an importance matrix.

    The size is that of the tensors in a gguf file; the same codes are scored from a file of whit's own.
    """
    torch.set_num_threads(1)
    out = Path(s.scratch) / f"{os.getpid()}-{name}"
    options = Options(device=s.device, restart=True)
    plan = prepare(s.model, out.with_suffix(".gguf"), Recipe("clip", [("*", name)]), options, export="gguf").plan
    rules = [("*", "bf16"), *plan.formats.items()]
    start = time.monotonic()
    quantize(s.model, out, Recipe("clip", rules), options=options, imatrix=Path(imatrix))
    row = _scored(s, out, time.monotonic() - start)
    weights = sum(spec.nbytes for item in plan.items for spec in item.written.values())
    shutil.rmtree(out)
    return row | {"weights_bytes": weights, "bits_per_weight": 8 * weights / plan.parameters}


def _scored(s: Setting, out: Path, seconds: float) -> dict[str, Any]:
    """Figures of the dequantized model in float32; bytes and bits are those of the weight files.

    A window at a time: many processes share a GPU's memory.
    """
    source = open_source(out)
    network, original = networks(s)
    for name, parameter in network.named_parameters():  # tied ones once
        parameter.data.copy_(source.read(source.tied.get(name, name)))
    source.checkpoint.close()
    baseline = LiveBaseline(original)
    found = [compare_windows(network, baseline, window, Silent()) for window in scored_windows(s)]
    kl = blocks(torch.cat([each.kl for each in found]))
    weights = sum(file.stat().st_size for file in weight_files(out))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    row = {
        "kl": kl.mean, "kl_ci95": kl.interval(0),
        "perplexity": math.exp(torch.cat([each.losses for each in found]).mean()),
        "top1_agreement": float(torch.cat([each.agreement for each in found]).double().mean()),
        "weights_bytes": weights, "bits_per_weight": 8 * weights / parameters, "seconds": round(seconds, 1),
    }  # fmt: skip
    release()
    return row


@lru_cache(maxsize=1)
def networks(s: Setting) -> tuple[Any, Any]:
    """One to hold the values that are scored, and the original; loaded once in a process."""
    first, second = (load_causal_lm(resolve_model(s.model), device=s.device, dtype="float32") for _ in range(2))
    return first, second


@lru_cache(maxsize=1)
def scored_windows(s: Setting) -> tuple[Tensor, ...]:
    """Windows (1, context) of the text."""
    tokens = tokenize(read_text(resolve_text(s.text)), load_tokenizer(resolve_model(s.model)), s.max_tokens, s.text)
    return torch.split(cut_windows(tokens, s.context), 1)


def release() -> None:
    """Give the GPU's memory to the other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
