"""What benchmarks/budget.py does in other processes: measure the harm of formats, and make and score one model.

Models are scored in float32 with their weights dequantized, so that the figures are those of the formats alone.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit import Calibration, Options, Recipe
from whit.allocation import Group, measured
from whit.checkpoint.gguf import read_gguf
from whit.evaluation import EvaluationOptions, evaluate
from whit.evaluation.size import weight_files
from whit.formats import parse_format
from whit.importance import measure_importance, write_imatrix
from whit.integrations.loading import load_causal_lm
from whit.job import Job, prepare
from whit.methods import GPTQ
from whit.modules import remove_packed
from whit.pipeline import quantize
from whit.tensor import Format, LayerStats, QuantizedTensor


@dataclass(frozen=True)
class Setting:
    """What all cells share. `host`: GPTQ's walk on a CPU core, where the walk of a small model is faster."""

    model: str
    text: str
    calibration: str
    samples: int
    context: int
    max_tokens: int | None
    device: str
    method: str
    scratch: str
    host: bool = True

    @property
    def tokens(self) -> Calibration:
        return Calibration(self.calibration, self.samples, self.context, 0)


@dataclass(frozen=True)
class HostGPTQ(GPTQ):
    """GPTQ whose walk over the columns, thousands of tiny steps, is done by the CPU wherever the model is."""

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        assert stats is not None
        near = replace(stats, hessian=stats.hessian.cpu(), magnitude=None, drift=None)
        return super().__call__(weight.cpu(), near, format).to(weight.device)


def undecided(s: Setting) -> Job:
    """The job that a budget starts from."""
    recipe = Recipe(method_of(s), [("*", "bf16")])
    return prepare(s.model, Path(s.scratch) / "none", recipe, Options(device=s.device), s.tokens)


def method_of(s: Setting) -> Any:
    """The method by name, with GPTQ's walk where it is quick."""
    return HostGPTQ() if s.method == "gptq" and s.host and s.device != "cpu" else s.method


def measure(s: Setting, how: str, wanted: dict[str, list[str]]) -> dict[str, Any]:
    """Errors by parameters (joined by spaces) and format, and the seconds they took."""
    torch.set_num_threads(1)
    start = time.monotonic()
    job = undecided(s)
    assert job.calibration is not None
    formats = {name: tuple(parse_format(f) for f in specs) for name, specs in wanted.items()}
    groups = measured(job, job.calibration.tokens, formats, how)  # type: ignore[arg-type]
    errors = {" ".join(g.parameters): {str(f): e for f, e in g.errors.items()} for g in groups}
    return {"errors": errors, "seconds": time.monotonic() - start}


def groups_of(errors: dict[str, dict[str, float]]) -> tuple[Group, ...]:
    """The inverse of what `measure` says."""
    return tuple(Group(tuple(n.split()), {parse_format(f): e for f, e in found.items()}) for n, found in errors.items())


def make(s: Setting, label: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """A row: the recipe's model written in whit's own format, and scored."""
    torch.set_num_threads(1)
    out = Path(s.scratch) / f"{os.getpid()}-{label}"
    asked = Recipe.from_dict(recipe)
    asked = Recipe(method_of(s), asked.rules)
    calibration = s.tokens if asked.needs_stats else None
    start = time.monotonic()
    quantize(s.model, out, asked, calibration=calibration, options=Options(device=s.device, restart=True))
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
    """A row: one of llama.cpp's mixes, by its rules, with an importance matrix."""
    torch.set_num_threads(1)
    out = Path(s.scratch) / f"{os.getpid()}-{name}.gguf"
    start = time.monotonic()
    quantize(
        s.model, out, Recipe("clip", [("*", name)]), options=Options(device=s.device, restart=True), export="gguf",
        imatrix=Path(imatrix),
    )  # fmt: skip
    row = _scored(s, out, time.monotonic() - start)
    out.unlink()
    return row


def _scored(s: Setting, out: Path, seconds: float) -> dict[str, Any]:
    """`weights_bytes` leaves out headers, and what a gguf file holds of the tokenizer."""
    network = load_causal_lm(str(out), device=s.device, dtype="float32")
    remove_packed(network, torch.float32)
    options = EvaluationOptions(
        baseline=s.model, text=s.text, context=s.context, max_tokens=s.max_tokens, device=s.device, dtype="float32"
    )
    found = evaluate(str(out), options, network=network)
    assert found.baseline is not None
    if out.suffix == ".gguf":
        weights = sum(tensor.stop - tensor.start for tensor in read_gguf(out).tensors.values())
    else:
        weights = sum(file.stat().st_size for file in weight_files(out))
    parameters = sum(prod(p.shape) for p in network.parameters())
    return {
        "kl": found.baseline.kl_mean, "kl_ci95": found.baseline.kl_ci95, "perplexity": found.perplexity,
        "top1_agreement": found.baseline.top1_agreement, "size_bytes": found.size_bytes, "weights_bytes": weights,
        "bits_per_weight": 8 * weights / parameters, "seconds": round(seconds, 1),
    }  # fmt: skip
