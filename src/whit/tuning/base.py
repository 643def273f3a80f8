"""A base of an adapter's own: where calibration chooses the codes, they are written beside the adapter, in OUT/base.

Methods that look at data see the examples that are trained on, those held out left out. Where the adapter begins with
what quantization lost (`init` data), codes and factors are chosen for each other: the model is quantized to the format
with a side-car of the adapter's rank (`methods.lowrank`: W ~ Q + B A under the hessian, by turns, each block behind
the quantized ones before it), the side-car becomes the adapter's start, and OUT/base holds the codes alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from whit.calibration import CalibrationTokens
from whit.checkpoint.places import work_path
from whit.checkpoint.reader import Checkpoint
from whit.errors import TrainingError
from whit.export.packed import PackedSource
from whit.formats.lowrank import A, B, side_car
from whit.model.skeleton import load_skeleton
from whit.pipeline import run
from whit.pipeline.feed import Given, NothingRuns
from whit.pipeline.job import Job, open_source, prepare
from whit.pipeline.plan import Item
from whit.recipe import Recipe
from whit.tensor import QuantizedTensor
from whit.training.adapters import check_targets
from whit.training.data import Example
from whit.training.packing import derive
from whit.training.places import set_factors
from whit.training.ranks import Ranks
from whit.training.settings import ALL_LINEAR, DEFAULT_INIT
from whit.tuning.job import TuningJob

BASE = "base"
START = "start"  # the base with the factors beside it, until the run is done
MOST = 128 * 2048  # tokens that are calibrated on

Told = Callable[[str, int, int], None]


def base_folder(job: TuningJob) -> Path:
    """Where the base lies while the run is not done."""
    return work_path(job.out) / BASE


def make_base(job: TuningJob, ranks: Ranks, progress: Told | None = None) -> None:
    """Write what the adapter is trained on, where calibration chooses its codes; what is there already stays.

    The first process writes, the others wait. Raises what quantization raises.
    """
    if job.tuning.calibrated and ranks.first:
        _make(job, progress)
    if job.tuning.calibrated:
        ranks.wait()


def set_start(job: TuningJob, adapted: Any) -> None:
    """Give the adapter the factors that the base was made for, where there are any."""
    if not job.tuning.calibrated or job.tuning.init == DEFAULT_INIT:
        return
    checkpoint = Checkpoint(work_path(job.out) / START)
    try:
        set_factors(adapted, lambda name: (checkpoint[f"{name}.{B}"], checkpoint[f"{name}.{A}"]))
    finally:
        checkpoint.close()


def forget_start(work: Path) -> None:
    """The run is done: what only its beginning needed goes."""
    shutil.rmtree(work / START, ignore_errors=True)


def _make(job: TuningJob, progress: Told | None) -> None:
    work, tuning = work_path(job.out), job.tuning
    options = replace(job.options, device=job.device, restart=False, progress=progress)
    patterns = _patterns(job)
    tokens = seen(job)

    def planned(out: Path, rank: int) -> Job:
        beside = [(pattern, f"{tuning.format}+r{rank}") for pattern in patterns] if rank else []
        plan = prepare(job.folder, out, Recipe(tuning.method, [("*", str(tuning.format)), *beside]), options)
        return replace(plan, calibration=tokens, model=job.model)

    if tuning.init == DEFAULT_INIT:
        run(planned(work / BASE, 0))
        return
    run(planned(work / START, tuning.rank))
    with _opened(work / START) as start:
        plan = planned(work / BASE, 0)
        run(plan, _WithoutSideCars(start, plan))


def _patterns(job: TuningJob) -> list[str]:
    """Rules' patterns for the linears that will have an adapter; TrainingError where there can be none."""
    model, targets = load_skeleton(job.folder, job.options.trust_remote_code), job.tuning.targets
    check_targets(model, targets)
    if targets == (ALL_LINEAR,):
        return ["*"]
    names = {name for name, _ in model.named_modules()}
    return [name if name in names else f"*.{name}" for name in targets]


def seen(job: TuningJob) -> CalibrationTokens:
    """What methods and starts that go by data see: the examples that are trained on."""
    return windows(job.data.examples, job.tuning.context or 1, job.options.seed)


def windows(examples: tuple[Example, ...], context: int, seed: int) -> CalibrationTokens:
    """The examples in a seeded order, one after the other, cut to windows (n, context) of at most MOST tokens in all.

    Where there are fewer tokens than one window has, they are it.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(derive(seed, "calibration")))
    text = torch.cat([examples[i].tokens for i in order.tolist()])[:MOST]
    context = min(context, len(text))
    if context < 2:
        raise TrainingError("calibration: the examples hold one token; there must be two; use a method without data")
    tokens = text[: len(text) // context * context].reshape(-1, context)
    return CalibrationTokens.of(tokens)


class _WithoutSideCars(NothingRuns):
    """A feed of codes that were chosen beside factors, without these; everything else comes as it is."""

    def __init__(self, start: PackedSource, plan: Job) -> None:
        self._start, self._original, self._device = start, plan.source, plan.device

    def give(self, item: Item) -> Given:
        weight = self._original.read(item.name)
        if item.format is None:
            return Given(weight)
        found = self._start.quantized(item.name)
        had = side_car(found.format)
        if had is not None:
            found = QuantizedTensor(had.base, found.shape, found.codes, had.inner(found.params))
        return Given(weight, quantized=found.to(self._device))


@contextmanager
def _opened(folder: Path) -> Iterator[PackedSource]:
    source = open_source(folder)
    assert isinstance(source, PackedSource)
    try:
        yield source
    finally:
        source.checkpoint.close()
