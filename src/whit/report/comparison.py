"""Candidates side by side: quantize a model in several ways, measure each against the original, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from whit.calibration import Calibration
from whit.errors import RecipeError
from whit.evaluation import EvaluationOptions, EvaluationResult, evaluate
from whit.evaluation.listener import Listener, Silent
from whit.pipeline import quantize
from whit.pipeline.job import Options
from whit.recipe import Recipe, parse_spec


@dataclass(frozen=True)
class Candidate:
    """A method (with a transform: `awq+gptq`) and a format, written `method:format`; `bf16` is the original itself."""

    method: str
    format: str

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """`hqq:int4-g64`, or `nf4-dq` for round to nearest; what does not exist is an error here."""
        method, colon, format = text.strip().rpartition(":")
        if colon and not method:
            raise RecipeError(f"candidate {text!r}: it names no method; write method:format, such as hqq:int4-g64")
        Recipe(method or "rtn")
        return cls(method or "rtn", parse_spec(format))

    @property
    def is_original(self) -> bool:
        return self.format == "bf16"

    @property
    def folder(self) -> str:
        """A name for its output that any file system takes."""
        return folder_name(f"{self.method}-{self.format}")


def folder_name(label: str) -> str:
    """The label with an underscore for everything that a file system may not take."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in label)


@dataclass(frozen=True)
class Row:
    """One candidate, measured. Divergences are nats per token; `seconds` is the time to quantize."""

    method: str
    format: str
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    kl_mean: float
    kl_ci95: tuple[float, float]
    kl_p99: float
    top1_agreement: float
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: str,
    candidate: Candidate,
    folder: Path,
    options: EvaluationOptions,
    listener: Listener | None = None,
    quantizing: Options | None = None,
    calibration: Calibration | None = None,
) -> Row:
    """Quantize `model` below `folder` (a finished result there is used again) and evaluate it against the original.

    `calibration` is for the methods that need data.
    """
    against = replace(options, baseline=model)
    if candidate.is_original:
        return _row(candidate, evaluate(model, against, listener or Silent()), 0.0, 0)
    out = folder / candidate.folder
    recipe = Recipe(candidate.method, [("*", candidate.format)])
    data = calibration if recipe.needs_text else None
    account = quantize(model, out, recipe, calibration=data, options=quantizing or Options())
    result = evaluate(str(out), against, listener or Silent())
    return _row(candidate, result, account.seconds, account.peak_memory_bytes)


def _row(candidate: Candidate, result: EvaluationResult, seconds: float, memory: int) -> Row:
    found = result.baseline
    assert found is not None  # `measure` asked for it
    return Row(
        candidate.method, candidate.format, result.bits_per_weight, result.size_bytes, result.perplexity,
        found.kl_mean, found.kl_ci95, found.kl_p99, found.top1_agreement, seconds, memory,
    )  # fmt: skip


HEADER = ("format", "method", "bits/weight", "MB", "perplexity", "KL", "95 %", "KL p99", "top-1", "s", "peak MB")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    half = (row.kl_ci95[1] - row.kl_ci95[0]) / 2
    size = (f"{row.bits_per_weight:.2f}", f"{row.size_bytes / 1e6:.1f}", f"{row.perplexity:.2f}")
    if row.format == "bf16":  # the original differs from itself by nothing
        return (row.format, "", *size, *("" for _ in HEADER[5:]))
    divergence = (f"{row.kl_mean:.5f}", f"±{half:.5f}", f"{row.kl_p99:.4f}", f"{100 * row.top1_agreement:.2f} %")
    cost = (f"{row.seconds:.1f}", f"{row.peak_memory_bytes / 1e6:.0f}")
    return (row.format, row.method, *size, *divergence, *cost)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|" + "---:|" * (len(HEADER) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])
