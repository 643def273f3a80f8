"""What end-to-end training begins with: the codes, params and ranges of its start, made ready to be moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import RecipeError
from whit.methods.joined import Matrices, Moving, Part, grouped, join
from whit.methods.nested import moving_parts
from whit.methods.straight import Fitted, Straight
from whit.pipeline import run as write
from whit.pipeline.job import Job, open_source
from whit.pipeline.plan import Item
from whit.pipeline.sources import Coded, Source
from whit.pipeline.transcode import recast
from whit.qat.inputs import Range
from whit.qat.job import OWN_TEXT, Training
from whit.qat.network import Network
from whit.qat.sampled import own_calibration
from whit.qat.trained import Frozen, Kept, Trained
from whit.tensor import QuantizedTensor, matrix_shape


def starting_codes(training: Training) -> Callable[[Item], QuantizedTensor]:
    """Reads the codes that training begins with, in the plan's formats; first makes them, where they are not there."""
    source: Source = training.job.source
    if training.mode == "full":
        if training.begin is not None:
            own = training.words.text == OWN_TEXT and training.begin.calibration is not None
            begin = replace(training.begin, calibration=own_calibration(training.begin)) if own else training.begin
            write(begin)
        source = open_source(_start(training))
    assert isinstance(source, Coded)
    coded = source

    def read(item: Item) -> QuantizedTensor:
        assert item.format is not None
        found = recast(coded.quantized(item.name), item.format, item.name)
        return QuantizedTensor(found.format, matrix_shape(found.shape), found.codes, found.params)

    return read


def _start(training: Training) -> Path:
    """The folder that full training begins with."""
    folder = training.begin.out if training.begin is not None else training.setting.start
    assert folder is not None
    return folder


def prepare_trained(training: Training, codes: Callable[[Item], QuantizedTensor]) -> dict[str, Trained]:
    """Every quantized parameter, made ready from its start; joined where that computes the same."""
    job, move = training.job, mover(training)
    trained: dict[str, Trained] = {}
    for items in _joined(job):
        starts = [codes(item).to(job.device) for item in items]
        parts = [Part(i.name, s.shape[0], i.matrix, i.parameter) for i, s in zip(items, starts, strict=True)]
        weight = None
        if training.mode == "full":
            weight = torch.cat([item.matrix(job.source.read(item.name).to(job.device)) for item in items])
        trained[items[0].name] = Matrices(parts, move(weight, join(starts)))
    return trained


def mover(training: Training) -> Callable[[Tensor | None, QuantizedTensor], Moving]:
    """Makes what moves of a matrix (rows, columns; None where codes stay) and the codes that it begins with."""
    course, plain = training.course, training.course.units == "plain"
    if training.mode == "scales":
        return lambda _, start: moving_parts(lambda _, part: Frozen(part, plain), None, start)
    make = Fitted if course.fitted else lambda own, part: Straight(own, part, course.inside, plain)

    def move(weight: Tensor | None, start: QuantizedTensor) -> Moving:
        assert weight is not None
        return moving_parts(make, weight, start)

    return move


def _joined(job: Job) -> list[list[Item]]:
    """Items that are trained as one."""
    items = {item.name: item for item in job.plan.items if item.target is not None}
    shapes = []
    for name, item in items.items():
        if item.format is not None and item.target is not None:
            columns = item.target.shape[-1]
            shapes.append((name, item.format, (prod(item.spec.shape) // columns, columns)))
    return [[items[name] for name in names] for names in grouped(shapes, job.device)]


def prepare_kept(job: Job, network: Network) -> dict[str, Trained]:
    """What is not quantized: norms, biases, embeddings."""
    parameters = dict(network.model.named_parameters())
    items = [item for item in job.plan.items if item.format is None and item.name in parameters]
    return {i.name: Kept(i.name, job.source.read(i.name).to(job.device), i.spec.dtype) for i in items}


def starting_ranges(training: Training) -> dict[str, Range]:
    """The static ranges of inputs, as the start has them."""
    job, found = training.job, dict[str, Range]()
    static = [i for i in job.plan.items if i.target is not None and i.activations and i.activations.needs_stats]
    if not static:
        return found
    with Checkpoint(_start(training)) as stored:
        for item in static:
            assert item.target is not None
            assert item.activations is not None
            holder = item.target.holder
            if missing := [key for key in item.activations.specs if f"{holder}.{key}" not in stored]:
                raise RecipeError(
                    f"{holder}: the start has no {missing[0]}; activations {item.activations} must begin with a "
                    "calibrated range; quantize the start with them, or name a method as --start"
                )
            values = {key: stored[f"{holder}.{key}"] for key in item.activations.specs}
            found[holder] = Range(holder, item.activations, values, job.device)
    return found
