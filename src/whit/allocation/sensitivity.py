"""What each group of matrices adds to the model's error in each format of a ladder.

One calibration pass over the unquantized model, one block in memory. A matrix's error is tr(dW H dW^T), H = sum x x^T
over the tokens, dW what clipped rounding (`methods.Clip`, weighed by H) leaves. Such sums of different matrices cannot
be compared, so each is put in one unit: the share of the block's output that is lost, the mean over tokens of
||dy||^2 / ||y||^2 where y is the hidden state behind the block. It is measured by running the block once with the
group alone in a probe format, and scaled by tr(dW H dW^T) to the other formats, to which it is proportional for small
errors. Hidden states pass through all later blocks, and their relative errors add up where they are independent. Of an
embedding or a head it is ||dW||^2 / ||W||^2, twice where one matrix is both.

A group is what reads one input, query, key and value, or gate and up, where engines fuse these and want one format for
all; else every matrix is a group of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from whit.allocation.space import inside_blocks
from whit.calibration.capture import BlockStats, Watch
from whit.calibration.runner import Runner
from whit.job import Job
from whit.kernels import add_gram
from whit.methods import Clip
from whit.methods.lowrank import beside
from whit.methods.stack import can_stack, energy, quantize_stack
from whit.plan import Item
from whit.tensor import Format, LayerStats

ROUNDING = Clip(steps=7, smallest=0.55)  # coarse: the order of formats and layers is wanted, not the last per cent
PROBES = 4  # samples on which a group's share of the block's output is measured
PROBE_BITS = 4  # or the next more: an error that is small, and yet far above the noise of 16-bit floats


@dataclass(frozen=True)
class Group:
    """Parameters that share a format, by name, and the error that each format would add: nats, or shares of outputs."""

    parameters: tuple[str, ...]
    errors: Mapping[Format, float]


def measure_sensitivity(job: Job, tokens: Tensor, wanted: Mapping[str, tuple[Format, ...]]) -> tuple[Group, ...]:
    """The groups of the parameters that `wanted` names with the formats to be tried, in the order of the blocks.

    `tokens` is int64 (samples, context). CalibrationError names a parameter that no token reached.
    """
    items = {item.name: item for item in job.plan.items if item.name in wanted}
    source = job.source
    found = [_outside(job, item, wanted[item.name]) for item in items.values() if not inside_blocks(job, item.name)]
    with torch.no_grad(), TemporaryDirectory(prefix="whit-") as scratch:

        def read(name: str) -> Tensor:
            return source.read(source.tied.get(name, name))

        runner = Runner(source.model, read, tokens, job.device, Path(scratch), twice=False)
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
                    found += _block(runner, index, before, stats, groups, items, wanted)
            if job.options.progress is not None:
                job.options.progress(name, index + 1, len(runner.names))
    return tuple(found)


def _outside(job: Job, item: Item, formats: Sequence[Format]) -> Group:
    """An embedding or a head: its inputs are not watched."""
    matrix = item.matrix(job.source.read(item.name)).to(job.device, torch.float32)
    count = 1 + sum(owner == item.name for owner in job.source.tied.values())
    errors = {}
    for format in formats:
        near = matrix.to(torch.bfloat16) if format.bits == 16 else ROUNDING(matrix, None, format).dequantize()
        errors[format] = count * float(((matrix - near).norm() / matrix.norm()) ** 2)
    return Group((item.name,), errors)


def _block(
    runner: Runner, index: int, before: Tensor, stats: BlockStats, groups: Sequence[tuple[str, ...]],
    items: Mapping[str, Item], wanted: Mapping[str, tuple[Format, ...]],
) -> Iterator[Group]:  # fmt: skip
    """The groups of a loaded block; `runner` holds its outputs, `before` the first of its inputs."""
    modules = dict(runner.blocks[index].named_parameters())
    prefix = f"{runner.names[index]}."
    for names in groups:
        members = [(items[n], modules[n.removeprefix(prefix)], stats.of(n)) for n in names]
        formats = [f for f in wanted[names[0]] if all(f in wanted[n] for n in names)]
        probe = min(formats, key=lambda f: (abs(f.bits - PROBE_BITS), f.bits < PROBE_BITS))
        rounded = [_rounded(*member, probe) for member in members]
        share = _share(runner, index, before, [(m[1], near) for m, (_, near) in zip(members, rounded, strict=True)])
        lost = {f: sum(_rounded(*member, f)[0] for member in members) for f in formats if f != probe}
        lost[probe] = sum(error for error, _ in rounded)
        unit = share / lost[probe] if lost[probe] > 0 else 0.0
        yield Group(tuple(names), {f: lost[f] * unit for f in formats})


def _rounded(
    item: Item, parameter: nn.Parameter, stats: tuple[LayerStats, ...], format: Format
) -> tuple[float, Tensor]:
    """tr(dW H dW^T), and the rounded parameter in its own shape."""
    matrix = item.matrix(parameter.data)
    count = len(stats) if can_stack(format) else 1
    near = quantize_stack(beside(ROUNDING), matrix, stats[:count], format).dequantize()
    difference = (matrix.to(torch.float32) - near).chunk(len(stats))
    lost = sum(float(energy(rows, s.hessian).sum()) for rows, s in zip(difference, stats, strict=True))
    return lost, item.parameter(near)


def _share(runner: Runner, index: int, before: Tensor, members: Sequence[tuple[nn.Parameter, Tensor]]) -> float:
    """The mean over tokens of ||dy||^2 / ||y||^2 behind the block, with only these parameters at the values given."""
    exact = [parameter.data.clone() for parameter, _ in members]
    for parameter, near in members:
        parameter.data.copy_(near)
    shares = []
    for number, sample in enumerate(before):
        whole = runner.inputs[number].to(torch.float64)
        lost = runner.forward(index, sample[None])[0].to(whole) - whole
        sizes = whole.square().sum(-1)
        shares.append((lost.square().sum(-1) / sizes.clamp_min(torch.finfo(torch.float32).tiny)).mean())
    for (parameter, _), values in zip(members, exact, strict=True):
        parameter.data.copy_(values)
    return float(torch.stack(shares).mean())
