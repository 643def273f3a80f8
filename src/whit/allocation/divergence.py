"""What each matrix adds to the divergence of the model's predictions, in each format of a ladder: measured.

    error(g, f) = mean over tokens of KL(p || q),   p the model's next-token distributions, q with g alone in format f

The matrix is quantized by the method that will be used, with the hessian of the unquantized model's inputs, and the
model runs on from its block over the first samples of the calibration text, in float32: 16-bit activations would
drown the better formats in noise. For small errors KL is a quadratic form of them, whose mixed terms average out over
independent errors, so that the figures add up. The whole model is in memory.

The rows of tables in bands are ranked by the other samples: by these the last bands would hardly occur in what is
measured, and seem to need no bits.

With `every` false it is measured in two formats of a group in a block, the smallest and one near 4 bits, and follows in
the others from L = tr(dW H dW^T), H = sum x x^T, by the line through both in log KL and log L: a fifth of the forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, log
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from whit.allocation.probe import DIGITS, PROBES, Probe, log_p
from whit.allocation.sensitivity import Group
from whit.allocation.space import Methods, inside_blocks, without_data
from whit.allocation.tables import bands_for, method_of_table, ranked
from whit.calibration.capture import BlockStats, Watch
from whit.calibration.runner import Runner, holding
from whit.calibration.storage import Storage
from whit.errors import UnsupportedModelError
from whit.formats.numeric import widened
from whit.methods import Method
from whit.methods.lowrank import beside
from whit.methods.stack import energy_lost, quantize_stack
from whit.model.graph import is_encoder_decoder
from whit.pipeline.job import Job
from whit.pipeline.plan import Item
from whit.tensor import Format, LayerStats

MIDDLE = 4  # bits of the second format in which the divergence is taken where not in all


def measure_divergence(
    job: Job, tokens: Tensor, wanted: Mapping[str, tuple[Format, ...]], every: bool = True, probes: int = PROBES,
    methods: Methods | None = None,
) -> tuple[Group, ...]:  # fmt: skip
    """The groups of the parameters that `wanted` names, with the divergence in each of their formats.

    It is taken over the first samples, of at most `probes` tokens; `every`: in every format. `tokens` is int64
    (samples, context). Of the methods that a format has in `methods` the best one counts: by the divergence where that
    is taken, else by tr(dW H dW^T). CalibrationError names a parameter that no token reached; UnsupportedModelError
    where the model predicts no next tokens.
    """
    if not job.source.model.can_generate():
        raise UnsupportedModelError(
            f"{type(job.source.model).__name__}: predicts no next tokens; their divergence cannot be measured; "
            "use --sensitivity hessian"
        )
    if is_encoder_decoder(job.source.model):
        raise UnsupportedModelError(
            f"{type(job.source.model).__name__}: reads one text and writes another; the divergence of every format is "
            "measured on models of one text; use --sensitivity hessian"
        )
    source, found = job.source, list[Group]()
    with torch.no_grad(), TemporaryDirectory(prefix="whit-") as scratch:
        runner = Runner(
            source.model, lambda name: widened(source.read(source.tied.get(name, name))), tokens, job.device,
            Storage(Path(scratch), job.options.input_memory), twice=False,
        )  # fmt: skip
        with runner.whole() as parameters:
            some = tokens[: max(probes // tokens.shape[1], 1)]
            probe = Probe(runner, some, tuple(log_p(runner.logits(row[None])) for row in some))
            measuring = Measuring(job, probe, parameters, wanted, Tried(job, methods or {}, every))
            for item in measuring.items.values():
                if not inside_blocks(job, item.name):
                    others = tokens[len(some) :] if len(tokens) > len(some) else tokens
                    found += measuring.table(item, ranked(others, item.spec.shape[0]))
            for index, name in enumerate(runner.names):
                found += measuring.block(index)
                if job.options.progress is not None:
                    job.options.progress(name, index + 1, len(runner.names))
    return tuple(found)


class Tried:
    """What is tried with a format: its methods, and how each rounds a matrix as the run will have it (but for a
    transform, and for the inputs that the quantized model has)."""

    def __init__(self, job: Job, methods: Methods, every: bool) -> None:
        assert job.recipe is not None
        self.every = every
        self.own, self.others = job.recipe.method, methods
        known = [method for several in methods.values() for method in several]
        self._calibrated = job.recipe.needs_stats or any(method.needs_stats for method in known)

    def methods(self, format: Format) -> tuple[Method, ...]:
        return self.others.get(format, (self.own,))

    def rounded(self, method: Method, matrix: Tensor, stats: tuple[LayerStats, ...] | None, format: Format) -> Tensor:
        if format.bits == 16:
            return matrix
        if stats is not None and self._calibrated:
            return quantize_stack(beside(method), matrix, stats, format).dequantize()
        return beside(without_data(method))(matrix, None, format).dequantize()

    def best(self, found: Mapping[Format, Method]) -> dict[Format, Method]:
        """Those of formats that were tried with others than the recipe's own."""
        return {format: method for format, method in found.items() if format in self.others}


@dataclass(frozen=True)
class Measuring:
    """A model in memory whose `parameters` are rounded one after the other, and come back as they were."""

    job: Job
    probe: Probe
    parameters: Mapping[str, nn.Parameter]
    wanted: Mapping[str, tuple[Format, ...]]
    tried: Tried

    @cached_property
    def items(self) -> Mapping[str, Item]:
        return {item.name: item for item in self.job.plan.items if item.name in self.wanted}

    def table(self, item: Item, ranks: Tensor) -> list[Group]:
        """An embedding or a head, whole or in bands of its rows, which lie in `ranks` by their use."""
        formats, tried = self.wanted[item.name], self.tried
        bands = bands_for(self.job, item, formats)
        if not bands:
            return [self._whole_table(item)]
        places = self._places(item)
        matrix = item.matrix(places[0].data)
        method = method_of_table(self.job, matrix, formats, tried.others)
        methods = {} if method == tried.own else dict.fromkeys(formats, method)
        taken, found = formats if tried.every else _anchors(formats), []
        for first, last in bands:
            rows, lost, harm = ranks[first:last].to(matrix.device), {}, {}
            for format in formats:
                near = tried.rounded(method, matrix[rows], None, format)
                lost[format] = float((matrix[rows] - near).square().sum(dtype=torch.float64))
                if format in taken:
                    mixed = matrix.clone()
                    mixed[rows] = near.to(mixed)
                    with holding([(place, item.parameter(mixed)) for place in places]):
                        harm[format] = self.probe.divergence()
            errors = {f: harm[f] if f in harm else _between(lost, harm, f) for f in formats}
            found.append(Group((item.name,), errors, methods, (first, last)))
        return found

    def block(self, index: int) -> Iterator[Group]:
        """The groups of a block; the runner's inputs go one block on."""
        runner = self.probe.runner
        inside = [name for name in self.items if name.startswith(f"{runner.names[index]}.")]
        before = runner.inputs[: len(self.probe.tokens)].clone()
        if not inside:
            runner.run(index)
            return
        watch = Watch({name: self.parameters[name] for name in inside})
        with watch:
            runner.run(index)
        stats = watch.stats()
        for names in stats.groups if self.job.exporter.fuses else tuple((name,) for name in inside):
            yield self._group(names, stats, index, before)

    def _group(self, names: Sequence[str], stats: BlockStats, index: int, entering: Tensor) -> Group:
        """Matrices of a block that get one format, whose inputs `stats` describe."""
        formats = [f for f in self.wanted[names[0]] if all(f in self.wanted[n] for n in names)]
        taken = formats if self.tried.every else _anchors(formats)
        matrices = {n: self.items[n].matrix(self.parameters[n].data) for n in names}
        lost, found, methods = {}, {}, {}
        for format in formats:
            least = inf
            for method in self.tried.methods(format):
                near = {n: self.tried.rounded(method, matrices[n], stats.of(n), format) for n in names}
                loss = harm = sum(energy_lost(matrices[n], near[n], stats.of(n)) for n in names)
                if format in taken:
                    with holding([(self.parameters[n], self.items[n].parameter(near[n])) for n in names]):
                        harm = self.probe.divergence(index, entering)
                if harm < least:
                    least, lost[format], methods[format] = harm, loss, method
            if format in taken:
                found[format] = least
        errors = {f: found[f] if f in found else _between(lost, found, f) for f in formats}
        return Group(tuple(names), errors, self.tried.best(methods))

    def _whole_table(self, item: Item) -> Group:
        places = self._places(item)
        matrix, errors, methods = item.matrix(places[0].data), {}, {}
        for format in self.wanted[item.name]:
            found = []
            for method in self.tried.methods(format):
                near = item.parameter(self.tried.rounded(method, matrix, None, format))
                with holding([(place, near) for place in places]):
                    found.append((self.probe.divergence(), method))
            errors[format], methods[format] = min(found, key=lambda pair: pair[0])
        return Group((item.name,), errors, self.tried.best(methods))

    def _places(self, item: Item) -> list[nn.Parameter]:
        """A parameter, and what is tied to it."""
        tied = self.job.source.tied
        sharing = [name for name, owner in tied.items() if owner == item.name and name in self.parameters]
        return [self.parameters[name] for name in (item.name, *sharing)]


def _anchors(formats: Sequence[Format]) -> list[Format]:
    """The smallest format and the one nearest to MIDDLE bits."""
    least = min(formats, key=lambda f: f.bits)
    return [least, min(formats, key=lambda f: (f is least, abs(f.bits - MIDDLE)))]


def _between(lost: Mapping[Format, float], found: Mapping[Format, float], format: Format) -> float:
    """The divergence in a format from those in two others and the layer's own losses."""
    known = [(log(lost[f]), log(kl)) for f, kl in found.items() if kl > 0 and lost[f] > 0]
    if not known or lost[format] <= 0:
        return 0.0
    (x, y), (x2, y2) = known[0], known[-1]
    slope = (y2 - y) / (x2 - x) if x2 != x else 1.0
    return float(f"{exp(y2 + slope * (log(lost[format]) - x2)):.{DIGITS}g}")
