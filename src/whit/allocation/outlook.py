"""What a size comes to before anything is measured: between which files the choice lies, and what measuring takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whit.allocation.probe import PROBES
from whit.allocation.recipe import Measure, check_size, planned
from whit.allocation.space import bytes_of, free_formats, ladder_of, methods_of
from whit.pipeline.job import Job
from whit.tensor import Format

ANCHORS = 2  # formats of a matrix in which `probe` takes the divergence


@dataclass(frozen=True)
class Outlook:
    """Bytes of the weight files: at most, and with the smallest and the largest format everywhere.

    `matrices` are free to choose for. The model runs `runs` times at most, each from one matrix's block on, over
    `tokens`; with `hessian` not at all beside the pass over the calibration text.
    """

    limit_bytes: int
    smallest_bytes: int
    largest_bytes: int
    matrices: int
    runs: int
    tokens: int


def foresee(
    job: Job, size_bytes: int, ladder: Sequence[str | Format] | None = None, measure: Measure = "probe"
) -> Outlook:
    """For a job prepared as for `budgeted`, without a weight; RecipeError where the size cannot be met."""
    ladder = ladder or ladder_of(job)
    wanted, methods = free_formats(job, ladder), methods_of(job, ladder)
    items = {item.name: item for item in job.plan.items}

    def file(largest: bool) -> int:
        pick = max if largest else min
        formats = {n: pick(f, key=lambda form, n=n: bytes_of(job, items[n], form)) for n, f in wanted.items()}  # type: ignore[misc]
        plan = planned(job, formats)[1]
        if not largest:
            check_size(plan, size_bytes)
        return plan.size_bytes

    runs = sum(_runs(formats, methods, measure) for formats in wanted.values())
    return Outlook(size_bytes, file(largest=False), file(largest=True), len(wanted), runs, PROBES)


def _runs(formats: Sequence[Format], methods: Mapping[Format, Sequence[object]], measure: Measure) -> int:
    """Of the model for one matrix, with every method that a format is tried with."""
    each = sorted((len(methods.get(format, (None,))) for format in formats), reverse=True)
    return {"kl": sum(each), "probe": sum(each[:ANCHORS]), "hessian": 0}[measure]
