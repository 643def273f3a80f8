"""The only loop over a model's blocks: read -> (calibrate) -> quantize -> pack -> write.

Without calibration one parameter is in memory at a time: while it is quantized the next is read and the last is
written. With calibration it is one block, its statistics and its inputs (`feed.BlockFeed`). A unit (a block) is
journaled once its bytes are on the disk, so that a killed run goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from math import isfinite, sqrt
from pathlib import Path

import torch
from torch import Tensor

from whit.calibration import Calibration
from whit.calibration.capture import EXPERT_TOKENS
from whit.checkpoint.work import WorkFolder, check_space, disk_errors, is_done
from whit.checkpoint.writer import Writer, index_json
from whit.coverage import Account, Entry, load_account
from whit.errors import NonFiniteError
from whit.feed import BlockFeed, Feed, Given, ReadAhead
from whit.finish import finish
from whit.formats.bands import bands_of
from whit.formats.lowrank import without_side_car
from whit.formats.numeric import check_finite, is_finite
from whit.importance import weighed
from whit.job import Job, Options, prepare
from whit.methods import Clip
from whit.methods.bands import use_of_rows
from whit.methods.lowrank import beside, repaired
from whit.methods.regrid import regrid
from whit.methods.stack import proxy_loss, quantize_stack
from whit.plan import Coded, Item, Source, Unit, floats, read_finite
from whit.recipe import Recipe
from whit.tensor import QuantizedTensor, matrix_shape
from whit.transcode import taken_over

SCALES = {"same": "its own scales", "moved": "its scales, moved", "new": "new scales"}
CHUNK = 1 << 20  # weights whose error is measured at a time: about what a processor's cache holds


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: Calibration | None = None,
    options: Options | None = None,
    export: str = "whit",
    imatrix: Path | None = None,
) -> Account:
    """Quantize a model folder or hub id to the folder `out`; returns the coverage account, as in its whit.json.

    `export` names the kind of file, one of `whit.export.EXPORTERS`. `imatrix` is an importance matrix of llama.cpp, by
    which the method `clip` weighs columns.
    `calibration` is for methods that need it, such as GPTQ; without one they use 128 samples of `whit:text`. Raises
    CalibrationError, CheckpointError, RecipeError, UnsupportedModelError, OutputError or NonFiniteError, each one
    sentence.
    """
    job = prepare(model, out, recipe or Recipe("clip" if imatrix else None), options or Options(), calibration, export)
    return run(job if imatrix is None else weighed(job, imatrix))


def dequantize(model: str | Path, out: str | Path, *, options: Options | None = None) -> Account:
    """Write a model, quantized by whit or not, as a plain transformers checkpoint in bfloat16."""
    return run(prepare(model, out, None, options or Options()))


def run(job: Job, feed: Feed | None = None) -> Account:
    """Do a prepared job, or what a killed run left of it. `feed` gives values that are there already."""
    if not is_done(job.out, job.fingerprint, job.options.restart):
        with disk_errors(job.out):
            work = WorkFolder(job.out, job.fingerprint, job.options.restart)
            try:
                if not work.complete:
                    _fill(job, work, feed)
                work.commit(job.single)
            finally:
                work.close()
    job.source.checkpoint.close()
    return load_account(job.out)


def _fill(job: Job, work: WorkFolder, ready: Feed | None) -> None:
    present = sum(path.stat().st_blocks * 512 for path in work.path.glob("*.safetensors"))
    check_space(work.path, job.plan.size_bytes - present)
    for name, content in index_json(job.plan.shards).items():
        work.write_file(name, content)
    writer = Writer(work.path, job.plan.shards)
    try:
        with torch.no_grad(), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scribe:
            try:
                todo = [unit for unit in job.plan.units if unit.name not in work.finished]
                feed = ready or _feed(job, todo, work, reader)
                _write_units(job, Output(job, work, writer, scribe), feed, todo)
            finally:
                for pool in (reader, scribe):
                    pool.shutdown(cancel_futures=True)
    finally:
        writer.close()
    finish(job, work)


def _feed(job: Job, todo: Sequence[Unit], work: WorkFolder, reader: ThreadPoolExecutor) -> Feed:
    if job.calibration is not None and job.recipe is not None and job.recipe.needs_stats:
        return BlockFeed(job, job.recipe.method, job.calibration, work.path, reader)
    items = [item for unit in todo for item in unit.items if not _is_copy(job.source, item)]
    return ReadAhead(job.source, items, reader)


class Output:
    """What is written, in order, by a thread of its own; at most one parameter waits."""

    def __init__(self, job: Job, work: WorkFolder, writer: Writer, scribe: ThreadPoolExecutor) -> None:
        self.source, self.exporter = job.source, job.exporter
        self.work, self.writer, self.scribe = work, writer, scribe
        self.pending: Future[None] | None = None
        self.decoded: list[float] = []

    def write(self, item: Item, tensors: Mapping[str, Tensor] | None, meant: Tensor | None = None) -> None:
        """Write an item's tensors and decode them again, as a reader will, to compare with what was `meant`.

        Without tensors it is copied as it is.
        """
        self._submit(self._write, item, tensors, meant)

    def record(self, unit: Unit, entries: Sequence[Entry], seconds: float) -> None:
        """Journal a unit once its bytes are on the disk."""
        self._submit(self._record, unit, entries, seconds)

    def wait(self) -> None:
        """Return when everything is done; raises what went wrong."""
        if self.pending is not None:
            self.pending.result()

    def _submit(self, *call: object) -> None:
        self.wait()
        self.pending = self.scribe.submit(*call)  # type: ignore[arg-type]

    def _write(self, item: Item, tensors: Mapping[str, Tensor] | None, meant: Tensor | None) -> None:
        if tensors is None:
            entry = self.source.entry(item.name)
            assert entry is not None, item.name
            self.writer.copy(next(iter(item.written)), self.source.checkpoint, entry, partial(self._check, item))
        else:
            for name, tensor in tensors.items():
                self.writer.write(name, tensor)
        if item.target is not None and item.format is not None and meant is not None:
            found = self.exporter.decode(item, {name: self.writer.read(name) for name in item.written})
            if found is not None:
                self.decoded.append(_difference(found.t() if item.target.transposed else found, meant.cpu()))

    def _check(self, item: Item, part: Tensor) -> None:
        """Raise NonFiniteError for a part with values that the parameter may not have; it says where in the whole."""
        if not is_finite(part):
            read_finite(self.source, item.name)

    def _record(self, unit: Unit, entries: Sequence[Entry], seconds: float) -> None:
        self.writer.sync()
        record = {"entries": [asdict(entry) for entry in entries], "seconds": seconds, "decoded": self.decoded}
        self.work.record(unit.name, record)
        self.decoded = []


def _write_units(job: Job, output: Output, feed: Feed, todo: Sequence[Unit]) -> None:
    """Every unit that is not finished, in order."""
    total = len(job.plan.units)
    for done, unit in enumerate(todo, total - len(todo) + 1):
        start = time.monotonic()
        with feed.unit(unit):
            entries = [_write_item(job, output, feed, item) for item in unit.items]
        output.record(unit, entries, time.monotonic() - start)
        if job.options.progress is not None:
            job.options.progress(unit.name, done, total)
    output.wait()


def _write_item(job: Job, output: Output, feed: Feed, item: Item) -> Entry:
    """One parameter; nothing of it stays but in the writer's hands."""
    if _is_copy(job.source, item) and not feed.changes(item):
        output.write(item, None)
        return entry_of(item)
    tensors, entry, approximation = _convert(job, item, feed.give(item))
    output.write(item, tensors, approximation)
    feed.take_back(item, approximation)
    return entry


def _is_copy(source: Source, item: Item) -> bool:
    return item.is_copy and source.entry(item.name) is not None


def _convert(job: Job, item: Item, given: Given) -> tuple[Mapping[str, Tensor], Entry, Tensor]:
    """The tensors that a parameter becomes, its account, and what they stand for in the parameter's own shape."""
    weight = given.weight
    if item.format is None or item.target is None or job.recipe is None:
        tensors = job.exporter.tensors(item, weight)
        dense = floats(item, job.exporter.restore(item, tensors))
        if is_finite(weight) and not is_finite(dense):
            raise _overflow(item, weight)
        entry = entry_of(item, relative_error(_rows(weight), _rows(dense)))
        if given.note is not None:
            entry = replace(entry, reason=f"{entry.reason}; {given.note}")
        return tensors, entry, dense
    check_finite(weight, item.name)
    matrix = item.matrix(weight).to(job.device)
    method, reason, loss = item.method or job.recipe.method, _note(given), None
    if item.method is not None:
        reason = "; ".join(filter(None, (f"by {item.method.name}, as a rule says", reason)))
    if (taken := taken_over(job, item.name, item.format)) is not None:
        quantized, reason = taken.to(job.device), "its codes as they were"
    elif given.quantized is not None:
        quantized = given.quantized
    elif item.name in job.regridded:
        quantized, reason = _regridded(job, item, matrix, given)
    elif given.stats is not None:
        quantized = quantize_stack(beside(method), matrix, given.stats, item.format)
    elif isinstance(method, Clip) and (weights := _importance(job, item)) is not None:
        plain = method.weighted(matrix, weights.to(job.device), without_side_car(item.format))
        quantized = repaired(plain, matrix, None, item.format)
    else:
        if job.importance:
            reason = "the importance matrix has nothing for it"
        if method.needs_stats:
            method, reason = Clip(), "by clip: calibration reaches the linears of blocks alone"
        quantized = beside(method, _use_of_rows(job, item))(matrix, None, item.format)
    near = quantized.dequantize()
    check_finite(near, f"{item.name}: what {method.name} made of it in {item.format}")
    if given.stats is not None:
        loss = float(f"{proxy_loss(matrix, near, given.stats):.5g}")
    reason = "; ".join(filter(None, (item.reason, reason))) or None
    entry = replace(entry_of(item, relative_error(matrix, near)), reason=reason, proxy_loss=loss, tokens=given.tokens)
    tensors = {**job.exporter.tensors(item, quantized), **job.exporter.inputs(item, given.inputs)}
    return tensors, entry, item.parameter(near)


def _overflow(item: Item, weight: Tensor) -> NonFiniteError:
    """What to say of a kept parameter with values that the file's type does not hold."""
    kind = next(spec.dtype for spec in item.written.values())
    largest, most = weight.abs().max().item(), torch.finfo(kind).max
    return NonFiniteError(
        f"{item.name}: {largest:.3g} is beyond {str(kind).removeprefix('torch.')}'s {most:.3g}; every weight must fit; "
        "choose another --export"
    )


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
    how = "lossless: its codes as they were" if found.lossless else f"new codes on {SCALES[found.scales]}"
    near = "" if given.stats is not None or found.lossless else ", to nearest: calibration does not reach it"
    return found.quantized, f"{how}{near}; {100 * found.share:.3g} % of the change lies in scales and zero points"


def _note(given: Given) -> str | None:
    """Which experts saw too little of the calibration text."""
    if not given.starved:
        return None
    names = ", ".join(map(str, given.starved))
    return f"experts {names} saw fewer than {EXPERT_TOKENS} tokens and were given the statistics of all experts"


def _difference(found: Tensor, meant: Tensor) -> float:
    """0 where two tensors are the same, bit for bit, else the relative error."""
    return 0.0 if torch.equal(found, meant) else max(relative_error(_rows(meant), _rows(found)), 1e-12)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(matrix_shape(tuple(tensor.shape)))


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """||W - W^|| / ||W|| of two matrices, 0 where W is 0; in chunks that stay in the processor's cache."""
    for dtype in (torch.float32, torch.float64):  # the second where squares leave the range of the first
        norm = difference = 0.0
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
