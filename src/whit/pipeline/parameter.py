"""One parameter of a run: its codes chosen, or its floats as the file holds them, and what is accounted of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import TypeAlias

import torch
from torch import Tensor

from whit.calibration.capture import EXPERT_TOKENS
from whit.errors import NonFiniteError
from whit.formats.bands import bands_of
from whit.formats.lowrank import without_side_car
from whit.formats.numeric import check_finite, dtype_name, is_finite
from whit.methods import Clip, Method
from whit.methods.bands import use_of_rows
from whit.methods.lowrank import beside, repaired
from whit.methods.regrid import regrid
from whit.methods.stack import quantize_stack, share_lost, weighted_stack
from whit.pipeline.coverage import CARRIED, Entry
from whit.pipeline.feed import Given
from whit.pipeline.job import Job
from whit.pipeline.near import Near
from whit.pipeline.plan import Item, floats
from whit.pipeline.sources import Coded
from whit.pipeline.transcode import taken_over
from whit.tensor import LayerStats, QuantizedTensor, matrix_shape

SCALES = {"same": "its own scales", "moved": "its scales, moved", "new": "new scales"}
Pairs: TypeAlias = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # matrices (out, in), and what became of each
CHUNK = 1 << 20  # weights whose error is measured at a time: about what a processor's cache holds


@dataclass(frozen=True)
class Chosen:
    """Codes, the method that chose them, and what a user should know of how."""

    quantized: QuantizedTensor
    method: Method
    how: str | None


def finish_parameter(job: Job, item: Item, given: Given) -> tuple[Mapping[str, Tensor], Entry, Tensor | Near]:
    """The tensors that a parameter becomes, its account, and what they stand for in the parameter's own shape.

    Of a stack of experts that is decoded as it is asked for.
    """
    if item.format is None or item.target is None or job.recipe is None:
        return _keep(job, item, given)
    check_finite(given.weight, item.name)
    matrix = item.matrix(given.weight).to(job.device)
    chosen = _choose(job, item, matrix, given)
    where = f"{item.name}: what {chosen.method.name} made of it in {item.format}"
    stack = Near.of(item, chosen.quantized)
    whole = [] if stack is not None else [chosen.quantized.dequantize()]
    count = stack.experts if stack is not None else 1

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        decoded = stack.matrices() if stack is not None else whole
        for exact, near in zip(matrix.chunk(count), decoded, strict=True):
            check_finite(near, where)
            yield exact, near

    entry = entry_of(item, _error_of(pairs))
    loss = None if given.stats is None else float(f"{_loss(pairs, given.stats * (count // len(given.stats))):.5g}")
    entry = replace(entry, reason=_said(item.reason, chosen.how), proxy_loss=loss, tokens=given.tokens)
    tensors = {**job.exporter.tensors(item, chosen.quantized), **job.exporter.inputs(item, given.inputs)}
    return tensors, entry, stack or item.parameter(whole[0])


def _keep(job: Job, item: Item, given: Given) -> tuple[Mapping[str, Tensor], Entry, Tensor]:
    """A parameter that stays floats, rounded as the kind of file has them."""
    tensors = job.exporter.tensors(item, given.weight)
    dense = floats(item, job.exporter.restore(item, tensors))
    if is_finite(given.weight) and not is_finite(dense):
        raise _overflow(item, given.weight)
    entry = entry_of(item, relative_error(as_matrix(given.weight), as_matrix(dense)))
    return tensors, entry if given.note is None else replace(entry, reason=f"{entry.reason}; {given.note}"), dense


def _overflow(item: Item, weight: Tensor) -> NonFiniteError:
    """What to say of a kept parameter with values that the file's type does not hold."""
    kind = next(spec.dtype for spec in item.written.values())
    largest, most = weight.abs().max().item(), torch.finfo(kind).max
    return NonFiniteError(
        f"{item.name}: {largest:.3g} is beyond {dtype_name(kind)}'s {most:.3g}; every weight must fit; "
        "choose another --export"
    )


def _choose(job: Job, item: Item, matrix: Tensor, given: Given) -> Chosen:
    """The codes of a matrix: those that it has already, or those that its method chooses."""
    assert item.format is not None
    assert job.recipe is not None
    method = item.method or job.recipe.method
    how = _said(None if item.method is None else f"by {method.name}, as a rule says", _starved(given))
    if (taken := taken_over(job, item.name, item.format)) is not None:
        return Chosen(taken.to(job.device), method, CARRIED)
    if given.quantized is not None:
        return Chosen(given.quantized, method, how)
    if item.name in job.regridded:
        quantized, how = _regridded(job, item, matrix, given)
        return Chosen(quantized, method, how)
    if given.stats is not None:
        return Chosen(quantize_stack(beside(method), matrix, given.stats, item.format), method, how)
    if isinstance(method, Clip) and (weights := _importance(job, item)) is not None:
        plain = weighted_stack(method.weighted, matrix, weights.to(job.device), without_side_car(item.format))
        return Chosen(repaired(plain, matrix, None, item.format), method, how)
    if job.importance:
        how = "the importance matrix has nothing for it"
    if method.needs_stats:
        method, how = Clip(), "by clip: calibration reaches the linears of blocks alone"
    return Chosen(beside(method, _use_of_rows(job, item))(matrix, None, item.format), method, how)


def _said(*parts: str | None) -> str | None:
    return "; ".join(filter(None, parts)) or None


def _importance(job: Job, item: Item) -> Tensor | None:
    """The weights of a parameter's columns, but for a table in bands, whose rows are weighed."""
    banded = item.format is not None and bands_of(item.format) is not None
    return None if banded else job.importance.get(item.name)


def _use_of_rows(job: Job, item: Item) -> Tensor | None:
    """How often each row of a table in bands is used, by the calibration text."""
    if item.format is None or bands_of(item.format) is None or job.calibration is None:
        return None
    return use_of_rows(job.calibration.tokens, item.spec.shape[0])


def _regridded(job: Job, item: Item, matrix: Tensor, given: Given) -> tuple[QuantizedTensor, str]:
    """New codes between the params that the parameter has in MODEL, and how much of the change lies in these."""
    assert isinstance(job.source, Coded)
    present = job.source.quantized(item.name).to(job.device)
    found = regrid(matrix, present, None if given.stats is None else given.stats[0])
    how = f"lossless: {CARRIED}" if found.lossless else f"new codes on {SCALES[found.scales]}"
    near = "" if given.stats is not None or found.lossless else ", to nearest: calibration does not reach it"
    return found.quantized, f"{how}{near}; {100 * found.share:.3g} % of the change lies in scales and zero points"


def _starved(given: Given) -> str | None:
    """Which experts saw too little of the calibration text."""
    if not given.starved:
        return None
    names = ", ".join(map(str, given.starved))
    return f"experts {names} saw fewer than {EXPERT_TOKENS} tokens and were given the statistics of all experts"


def _loss(pairs: Pairs, stats: Sequence[LayerStats]) -> float:
    """The proxy loss of matrices, each by its own statistics."""
    return share_lost((exact, near, s) for (exact, near), s in zip(pairs(), stats, strict=True))


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """||W - W^|| / ||W|| of two matrices, 0 where W is 0."""
    return _error_of(lambda: [(weight, approximation)])


def _error_of(pairs: Pairs) -> float:
    """The same of several matrices below each other; in chunks that stay in the processor's cache."""
    for dtype in (torch.float32, torch.float64):  # the second where squares leave the range of the first
        norm = difference = 0.0
        for weight, approximation in pairs():
            rows = max(CHUNK // max(weight.shape[1], 1), 1)
            for exact, near in zip(torch.split(weight, rows), torch.split(approximation, rows), strict=True):
                row = exact.to(dtype).reshape(-1)
                norm += row.square().sum().item()
                row = row - near.reshape(-1)
                difference += row.square().sum().item()
        if isfinite(norm) and norm > 0:
            return float(f"{sqrt(difference / norm):.5g}")
    return 0.0


def entry_of(item: Item, relative_error: float = 0.0) -> Entry:
    """The account of a planned parameter; the error is 0 where it is kept as it is."""
    if item.format is None:
        return Entry(item.name, "kept", None, item.reason, item.bits_per_weight, relative_error)
    how = None if item.activations is None else str(item.activations)
    quantized = (str(item.format), item.reason, item.bits_per_weight, relative_error)
    return Entry(item.name, "quantized", *quantized, activations=how)


def as_matrix(tensor: Tensor) -> Tensor:
    """With its leading dimensions flattened."""
    return tensor.reshape(matrix_shape(tuple(tensor.shape)))
