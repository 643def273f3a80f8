"""The only loop over a model's blocks: read -> (calibrate) -> quantize -> pack -> write.

Without calibration one parameter is in memory at a time: while it is quantized the next is read and the last is
written. With calibration it is one block, its statistics and its inputs (`feed.BlockFeed`). A unit (a block) is
journaled once its bytes are on the disk, so that a killed run goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from whit.calibration import Calibration
from whit.checkpoint.files import check_side_files
from whit.checkpoint.places import check_space
from whit.checkpoint.work import WorkFolder, disk_errors, is_done
from whit.checkpoint.writer import Writer, index_json
from whit.errors import CheckpointError, OutputError, RecipeError
from whit.export import kind_of
from whit.formats.numeric import is_finite
from whit.named import require
from whit.pipeline.coverage import Account, Entry, load_account
from whit.pipeline.feed import BlockFeed, Feed, ReadAhead
from whit.pipeline.finish import finish
from whit.pipeline.importance import weighed
from whit.pipeline.job import Job, Options, prepare
from whit.pipeline.parameter import as_matrix, entry_of, finish_parameter, relative_error
from whit.pipeline.plan import Item, Unit
from whit.pipeline.sources import Source, read_finite
from whit.recipe import Recipe
from whit.tensor import Format


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Format | Path | None = None,
    *,
    calibration: Calibration | str | Path | Sequence[str] | None = None,
    options: Options | None = None,
    export: str | None = None,
    imatrix: Path | None = None,
) -> Account:
    """Quantize a model folder or hub id to the folder `out`; returns the coverage account, as in its whit.json.

    - `recipe`: a Recipe, the shorthand of a format for everything ("int4-g128"), or a recipe's .toml file; without one
      the format is what the kind of file usually holds.
    - `calibration`: for methods that need it, such as GPTQ: a Calibration, or just its text (a file, a list of texts);
      without one they use 128 samples of `whit:text`.
    - `export`: the kind of file, a name of `whit.export.EXPORTERS`; without one GGUF if `out` ends in .gguf, else
      whit's own.
    - `imatrix`: an importance matrix of llama.cpp, by which the method `clip` weighs columns.

    A model in memory is for `whit.quantize_model`. Raises CalibrationError, CheckpointError, RecipeError,
    UnsupportedModelError, OutputError or NonFiniteError, each with one sentence.
    """
    advice = "it must be a folder or a hub id; give one, or quantize a model in memory by whit.quantize_model"
    require(model, str | Path, "MODEL", advice, CheckpointError)
    require(out, str | Path, "OUT", "it must be a new folder's name; give one", OutputError)
    require(options, Options | None, "options", "they must be whit.Options(seed=..., device=...); give these")
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration, seed=(options or Options()).seed)
    wanted = _recipe(recipe, imatrix is not None)
    job = prepare(model, out, wanted, options or Options(), calibration, export or kind_of(out))
    return run(job if imatrix is None else weighed(job, imatrix))


def _recipe(given: Recipe | str | Format | Path | None, weighs: bool) -> Recipe:
    """A recipe from what a caller has of it; one that `weighs` columns clips."""
    if given is None or isinstance(given, Recipe):
        return given or Recipe("clip" if weighs else None)
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith(".toml")):
        return Recipe.load(given)
    return Recipe("clip" if weighs else None, [("*", given)])


def dequantize(model: str | Path, out: str | Path, *, options: Options | None = None) -> Account:
    """Write a model, quantized by whit or not, as a plain transformers checkpoint in bfloat16."""
    return run(prepare(model, out, None, options or Options()))


def run(job: Job, feed: Feed | None = None) -> Account:
    """Do a prepared job, or the rest of one that was killed. `feed` gives values that exist already.

    RecipeError if nothing is quantized and the kind of file requires that something is.
    """
    if not any(item.format for item in job.plan.items) and (problems := job.exporter.problems({})):
        raise RecipeError("\n".join(problems))
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
    check_side_files(job.source.checkpoint.folder, job.options.trust_remote_code)  # they may have changed
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

    def _submit(self, task: Callable[..., None], *given: object) -> None:
        self.wait()
        self.pending = self.scribe.submit(task, *given)

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
                self.decoded.append(_difference(found.mT if item.target.transposed else found, meant.cpu()))

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
    tensors, entry, approximation = finish_parameter(job, item, feed.give(item))
    if isinstance(approximation, Tensor):
        output.write(item, tensors, approximation)
    else:
        output.write(item, tensors, approximation.whole() if job.exporter.reads_back else None)
    feed.take_back(item, approximation)
    return entry


def _is_copy(source: Source, item: Item) -> bool:
    return item.is_copy and source.entry(item.name) is not None


def _difference(found: Tensor, meant: Tensor) -> float:
    """0 where two tensors are the same, bit for bit, else the relative error."""
    return 0.0 if torch.equal(found, meant) else max(relative_error(as_matrix(meant), as_matrix(found)), 1e-12)
