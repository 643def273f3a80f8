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
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, inf, log
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from whit.allocation.sensitivity import Group
from whit.allocation.space import Methods, inside_blocks, without_data
from whit.allocation.tables import bands_for, method_of_table, ranked
from whit.calibration.capture import Watch
from whit.calibration.runner import Runner
from whit.calibration.storage import Storage
from whit.errors import UnsupportedModelError
from whit.job import Job
from whit.methods import Method
from whit.methods.lowrank import beside
from whit.methods.stack import energy, quantize_stack
from whit.plan import Item
from whit.tensor import Format, LayerStats

PROBES = 4096  # tokens over which the divergence is taken
ROWS = 256  # tokens whose distributions are compared at a time
MIDDLE = 4  # bits of the second format in which the divergence is taken where not in all
DIGITS = 6  # that are kept: more than the text's own noise leaves, and none that the number of threads could move


@dataclass(frozen=True)
class Probe:
    """Samples whose divergence is taken: `tokens` (n, context) and what the unquantized model predicts, log p."""

    runner: Runner
    tokens: Tensor
    exact: tuple[Tensor, ...]

    def divergence(self, index: int = 0, hidden: Tensor | None = None) -> float:
        """Nats per token of the model as it is now, where `hidden` (n, context, hidden) enters block `index`."""
        found = []
        for number, (row, exact) in enumerate(zip(self.tokens, self.exact, strict=True)):
            entering = None if hidden is None else hidden[number : number + 1]
            found.append(_kl(exact, self.runner.logits(row[None], index, entering)))
        return float(f"{torch.cat(found).double().cpu().numpy().mean():.{DIGITS}g}")


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
    items = {item.name: item for item in job.plan.items if item.name in wanted}
    source, tried, found = job.source, Tried(job, methods or {}, every), []
    with torch.no_grad(), TemporaryDirectory(prefix="whit-") as scratch:
        runner = Runner(
            source.model, lambda name: _single(source.read(source.tied.get(name, name))), tokens, job.device,
            Storage(Path(scratch), job.options.input_memory), twice=False,
        )  # fmt: skip
        with runner.whole() as parameters:
            some = tokens[: max(probes // tokens.shape[1], 1)]
            probe = Probe(runner, some, tuple(_log_p(runner.logits(row[None])) for row in some))
            for item in items.values():
                if not inside_blocks(job, item.name):
                    others = tokens[len(some) :] if len(tokens) > len(some) else tokens
                    ranks = ranked(others, item.spec.shape[0])
                    found += _tables(job, probe, item, parameters, wanted[item.name], tried, ranks)
            for index, name in enumerate(runner.names):
                found += _block(job, probe, index, parameters, items, wanted, tried)
                if job.options.progress is not None:
                    job.options.progress(name, index + 1, len(runner.names))
    return tuple(found)


class Tried:
    """What is tried with a format: its methods, and how each rounds a matrix as the run will have it (but for a
    transform, and for the inputs that the quantized model has)."""

    def __init__(self, job: Job, methods: Methods, every: bool) -> None:
        assert job.recipe is not None
        self.every = every
        self._own, self.others = job.recipe.method, methods
        known = [method for several in methods.values() for method in several]
        self._calibrated = job.recipe.needs_stats or any(method.needs_stats for method in known)

    def methods(self, format: Format) -> tuple[Method, ...]:
        return self.others.get(format, (self._own,))

    def rounded(self, method: Method, matrix: Tensor, stats: tuple[LayerStats, ...] | None, format: Format) -> Tensor:
        if format.bits == 16:
            return matrix
        if stats is not None and self._calibrated:
            return quantize_stack(beside(method), matrix, stats, format).dequantize()
        return beside(without_data(method))(matrix, None, format).dequantize()

    def best(self, found: Mapping[Format, Method]) -> dict[Format, Method]:
        """Those of formats that were tried with others than the recipe's own."""
        return {format: method for format, method in found.items() if format in self.others}


def _tables(
    job: Job, probe: Probe, item: Item, parameters: Mapping[str, nn.Parameter], formats: Sequence[Format], tried: Tried,
    ranks: Tensor,
) -> list[Group]:  # fmt: skip
    """An embedding or a head, whole or in bands of its rows, which lie in `ranks` by their use."""
    bands = bands_for(job, item, formats)
    if not bands:
        return [_outside(job, probe, item, parameters, formats, tried)]
    places = _places(job, item, parameters)
    matrix = item.matrix(places[0].data)
    method = method_of_table(job, matrix, formats, tried.others)
    methods = {} if method == job.recipe.method else dict.fromkeys(formats, method)  # type: ignore[union-attr]
    taken, found = formats if tried.every else _anchors(formats), []
    for first, last in bands:
        rows, lost, harm = ranks[first:last].to(matrix.device), {}, {}
        for format in formats:
            near = tried.rounded(method, matrix[rows], None, format)
            lost[format] = float((matrix[rows] - near).square().sum(dtype=torch.float64))
            if format in taken:
                mixed = matrix.clone()
                mixed[rows] = near.to(mixed)
                with _replaced([(place, item.parameter(mixed)) for place in places]):
                    harm[format] = probe.divergence()
        errors = {f: harm[f] if f in harm else _between(lost, harm, f) for f in formats}
        found.append(Group((item.name,), errors, methods, (first, last)))
    return found


def _places(job: Job, item: Item, parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """A parameter, and what is tied to it."""
    sharing = [name for name, owner in job.source.tied.items() if owner == item.name and name in parameters]
    return [parameters[name] for name in (item.name, *sharing)]


def _outside(
    job: Job, probe: Probe, item: Item, parameters: Mapping[str, nn.Parameter], formats: Sequence[Format], tried: Tried
) -> Group:
    """An embedding or a head, and what is tied to it."""
    places = _places(job, item, parameters)
    matrix, errors, methods = item.matrix(places[0].data), {}, {}
    for format in formats:
        found = []
        for method in tried.methods(format):
            near = item.parameter(tried.rounded(method, matrix, None, format))
            with _replaced([(place, near) for place in places]):
                found.append((probe.divergence(), method))
        errors[format], methods[format] = min(found, key=lambda pair: pair[0])
    return Group((item.name,), errors, tried.best(methods))


def _block(
    job: Job, probe: Probe, index: int, parameters: Mapping[str, nn.Parameter], items: Mapping[str, Item],
    wanted: Mapping[str, tuple[Format, ...]], tried: Tried,
) -> Iterator[Group]:  # fmt: skip
    """The groups of a block; the runner's inputs go one block on."""
    runner = probe.runner
    inside = {n: parameters[n] for n in items if n.startswith(f"{runner.names[index]}.")}
    before = runner.inputs[: len(probe.tokens)].clone()
    if not inside:
        runner.run(index)
        return
    watch = Watch(inside)
    with watch:
        runner.run(index)
    stats = watch.stats()
    for names in stats.groups if job.exporter.fuses else tuple((name,) for name in inside):
        formats = [f for f in wanted[names[0]] if all(f in wanted[n] for n in names)]
        taken = formats if tried.every else _anchors(formats)
        lost, found, methods = {}, {}, {}
        for format in formats:
            least = inf
            for method in tried.methods(format):
                near = {n: tried.rounded(method, items[n].matrix(inside[n].data), stats.of(n), format) for n in names}
                loss = harm = sum(_loss(items[n].matrix(inside[n].data), near[n], stats.of(n)) for n in names)
                if format in taken:
                    with _replaced([(inside[n], items[n].parameter(near[n])) for n in names]):
                        harm = probe.divergence(index, before)
                if harm < least:
                    least, lost[format], methods[format] = harm, loss, method
            if format in taken:
                found[format] = least
        errors = {f: found[f] if f in found else _between(lost, found, f) for f in formats}
        yield Group(tuple(names), errors, tried.best(methods))


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


def _loss(matrix: Tensor, near: Tensor, stats: Sequence[LayerStats]) -> float:
    """tr(dW H dW^T), summed over the matrices of a stack."""
    parts = (matrix.to(torch.float32) - near).chunk(len(stats))
    return sum(float(energy(rows, s.hessian).sum()) for rows, s in zip(parts, stats, strict=True))


@contextmanager
def _replaced(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Parameters with other values, for a while."""
    exact = [parameter.data.clone() for parameter, _ in values]
    for parameter, near in values:
        parameter.data.copy_(near)
    try:
        yield
    finally:
        for (parameter, _), before in zip(values, exact, strict=True):
            parameter.data.copy_(before)


def _kl(exact: Tensor, logits: Tensor) -> Tensor:
    """(context,) nats for log p (context, vocabulary) and the logits of q.

    As sum p (e^d - 1 - d), d = log q - log p: no term is negative, so that small sums are no differences of large ones.
    """
    parts = []
    for p, q in zip(torch.split(exact, ROWS), torch.split(logits, ROWS), strict=True):
        d = _log_p(q) - p
        parts.append((p.exp() * (torch.expm1(d) - d)).masked_fill_(p == -torch.inf, 0.0).sum(dim=-1))
    return torch.cat(parts)


def _log_p(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.float32), dim=-1)


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
