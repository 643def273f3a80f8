"""What each group of matrices adds to the model's error in each format of a ladder.

One calibration pass over the unquantized model, one block in memory. A matrix's error is tr(dW H dW^T), H = sum x x^T
over the tokens, dW what clipped rounding (`methods.Clip`, weighed by H) leaves. Such sums of different matrices cannot
be compared, so each is put in one unit: the share of the block's output that is lost, the mean over tokens of
||dy||^2 / ||y||^2 where y is the hidden state behind the block. It is measured by running the block once with the
group alone in a probe format, and scaled by tr(dW H dW^T) to the other formats, to which it is proportional for small
errors. Hidden states pass through all later blocks, and their relative errors add up where they are independent. Of an
embedding or a head it is ||dW||^2 / ||W||^2, twice where one matrix is both; in bands of rows (`allocation.tables`)
each row's part counts as often as its token occurs.

A group is what reads one input, query, key and value, or gate and up, where engines fuse these and want one format for
all; else every matrix is a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import torch
from torch import Tensor, nn

from whit.allocation.space import Methods, inside_blocks, without_data
from whit.allocation.tables import Band, bands_for, method_of_table, ranked
from whit.calibration.capture import Watch
from whit.calibration.runner import Runner, holding
from whit.calibration.storage import Storage
from whit.kernels import add_gram
from whit.methods import Clip, Method
from whit.methods.bands import use_of_rows
from whit.methods.base import Quantizer
from whit.methods.lowrank import beside
from whit.methods.stack import can_stack, energy_lost, quantize_stack
from whit.pipeline.job import Job
from whit.pipeline.plan import Item
from whit.tensor import Format, LayerStats

ROUNDING = Clip(steps=7, smallest=0.55)  # coarse: the order of formats and layers is wanted, not the last per cent
PROBES = 4  # samples on which a group's share of the block's output is measured
UNSEEN = 0.5  # that a token counts more than it occurs: what the text has not may come
PROBE_BITS = 4  # or the next more: an error that is small, and yet far above the noise of 16-bit floats


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that share a format, and the error that each format would add: nats per token, or shares of
    outputs.

    `methods`: for formats that were tried with several methods, the one of least error. `band`: of a table, only the
    rows with these ranks [first, last) by use.
    """

    parameters: tuple[str, ...]
    errors: Mapping[Format, float]
    methods: Mapping[Format, Method] = field(default_factory=dict)
    band: Band | None = None

    @property
    def name(self) -> str:
        """The parameters, and the band of one of them: `model.embed_tokens.weight[128:256]`."""
        return " ".join(self.parameters) + ("" if self.band is None else f"[{self.band[0]}:{self.band[1]}]")

    @classmethod
    def named(cls, name: str, errors: Mapping[Format, float], methods: Mapping[Format, Method] | None = None) -> Group:
        """The inverse of `name`."""
        names, bracket, ranks = name.removesuffix("]").partition("[")
        first, _, last = ranks.partition(":")
        return cls(tuple(names.split()), errors, methods or {}, (int(first), int(last)) if bracket else None)


def measure_sensitivity(
    job: Job, tokens: Tensor, wanted: Mapping[str, tuple[Format, ...]], methods: Methods | None = None
) -> tuple[Group, ...]:
    """The groups of the parameters that `wanted` names with the formats to be tried, in the order of the blocks.

    `tokens` is int64 (samples, context). For a format that `methods` has, each of these is tried. CalibrationError
    names a parameter that no token reached.
    """
    tried = methods or {}
    items = {item.name: item for item in job.plan.items if item.name in wanted}
    source = job.source
    outside = [item for item in items.values() if not inside_blocks(job, item.name)]
    found = [group for item in outside for group in _tables(job, item, wanted[item.name], tried, tokens)]
    with torch.no_grad(), TemporaryDirectory(prefix="whit-") as scratch:

        def read(name: str) -> Tensor:
            return source.read(source.tied.get(name, name))

        storage = Storage(Path(scratch), job.options.input_memory)
        runner = Runner(source.model, read, tokens, job.device, storage, twice=False)
        for index, name in enumerate(runner.names):
            with runner.loaded(index) as parameters:
                inside = {p: parameters[p] for p in parameters if p in items}
                before = runner.inputs[:PROBES].clone()
                watch = Watch(inside, add_gram)
                with watch:
                    runner.run(index)
                if inside:
                    stats = watch.stats()
                    groups = stats.groups if job.exporter.fuses else tuple((name,) for name in inside)
                    probe = partial(_share, runner, index, before)
                    modules = {n: parameters[n] for n in items if n in parameters}
                    members = [[(items[n], modules[n], stats.of(n)) for n in names] for names in groups]
                    found += [_measured(each, wanted, tried, probe) for each in members]
            if job.options.progress is not None:
                job.options.progress(name, index + 1, len(runner.names))
    return tuple(found)


def _tables(job: Job, item: Item, formats: Sequence[Format], methods: Methods, tokens: Tensor) -> list[Group]:
    """An embedding or a head, whole or in bands; an error counts as often as its row is used."""
    bands = bands_for(job, item, formats)
    if not bands:
        return [_outside(job, item, formats, methods)]
    matrix = item.matrix(job.source.read(item.name)).to(job.device, torch.float32)
    count = 1 + sum(owner == item.name for owner in job.source.tied.values())
    use = use_of_rows(tokens, len(matrix)).to(matrix) + UNSEEN
    whole = float(use @ matrix.square().sum(1))
    order, found = ranked(tokens, len(matrix)).to(matrix.device), []
    method = method_of_table(job, matrix, formats, methods)
    named = {} if method == job.recipe.method else dict.fromkeys(formats, method)  # type: ignore[union-attr]
    for first, last in bands:
        rows = order[first:last]
        near = {f: without_data(method)(matrix[rows], None, f).dequantize() for f in formats}
        errors = {f: count * float(use[rows] @ (matrix[rows] - near[f]).square().sum(1)) / whole for f in formats}
        found.append(Group((item.name,), errors, named, (first, last)))
    return found


def _outside(job: Job, item: Item, formats: Sequence[Format], methods: Methods) -> Group:
    """An embedding or a head: its inputs are not watched."""
    matrix = item.matrix(job.source.read(item.name)).to(job.device, torch.float32)
    count = 1 + sum(owner == item.name for owner in job.source.tied.values())

    def lost(format: Format, method: Quantizer) -> float:
        near = matrix.to(torch.bfloat16) if format.bits == 16 else method(matrix, None, format).dequantize()
        return count * float(((matrix - near).norm() / matrix.norm()) ** 2)

    chosen, errors = {}, {}
    for format in formats:
        errors[format], best = min(
            ((lost(format, without_data(method)), method) for method in methods.get(format, (ROUNDING,))),
            key=lambda pair: pair[0],
        )
        if format in methods:
            chosen[format] = best
    return Group((item.name,), errors, chosen)


Member: TypeAlias = tuple[Item, nn.Parameter, tuple[LayerStats, ...]]


def _measured(
    members: Sequence[Member], wanted: Mapping[str, tuple[Format, ...]], methods: Methods,
    share: Callable[[Sequence[tuple[nn.Parameter, Tensor]]], float],
) -> Group:  # fmt: skip
    """A group of a loaded block; `share` is what is lost of the block's output with parameters at other values."""
    names = tuple(item.name for item, _, _ in members)
    formats = [f for f in wanted[names[0]] if all(f in wanted[n] for n in names)]
    probe = min(formats, key=lambda f: (abs(f.bits - PROBE_BITS), f.bits < PROBE_BITS))
    lost, chosen, unit = {}, {}, 0.0
    for format in formats:
        tried = []
        for method in methods.get(format, (ROUNDING,)):
            rounded = [_rounded(*member, format, method) for member in members]
            tried.append((sum(error for error, _ in rounded), method, [near for _, near in rounded]))
        lost[format], best, values = min(tried, key=lambda entry: entry[0])
        if format in methods:
            chosen[format] = best
        if format == probe and lost[format] > 0:
            unit = share([(m[1], near) for m, near in zip(members, values, strict=True)]) / lost[format]
    return Group(names, {f: loss * unit for f, loss in lost.items()}, chosen)


def _rounded(
    item: Item, parameter: nn.Parameter, stats: tuple[LayerStats, ...], format: Format, method: Method
) -> tuple[float, Tensor]:
    """tr(dW H dW^T), and the rounded parameter in its own shape."""
    matrix = item.matrix(parameter.data)
    count = len(stats) if can_stack(format) else 1
    near = quantize_stack(beside(method), matrix, stats[:count], format).dequantize()
    return energy_lost(matrix, near, stats), item.parameter(near)


def _share(runner: Runner, index: int, before: Tensor, members: Sequence[tuple[nn.Parameter, Tensor]]) -> float:
    """The mean over tokens of ||dy||^2 / ||y||^2 behind the block, with only these parameters at the values given."""
    shares = []
    with holding(members):
        for number, sample in enumerate(before):
            whole = runner.made(runner.inputs[number]).to(torch.float64)
            lost = runner.made(runner.forward(index, sample[None])[0]).to(whole) - whole
            sizes = whole.square().sum(-1)
            shares.append((lost.square().sum(-1) / sizes.clamp_min(torch.finfo(torch.float32).tiny)).mean())
    return float(torch.stack(shares).mean())
