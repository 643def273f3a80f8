"""An importance matrix from whit's calibration: the mean square of every input column of every linear in the blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from whit.calibration import Calibration
from whit.calibration.capture import Watch
from whit.calibration.runner import Runner
from whit.calibration.storage import Storage
from whit.checkpoint.files import write_whole
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.places import check_place
from whit.devices import find_device
from whit.errors import OutputError, RecipeError
from whit.export.base import Importance
from whit.export.gguf.architectures import architecture_of
from whit.export.gguf.imatrix import Imatrix, dat_bytes, gguf_bytes, read_imatrix
from whit.integrations.loading import load_tokenizer, maximum_context
from whit.kernels import add_gram
from whit.model.targets import find_targets
from whit.pipeline.job import Job, open_source
from whit.pipeline.sources import read_to_run


def measure_importance(
    model: str | Path, calibration: Calibration, device: str = "auto", trust_remote_code: bool = False
) -> Imatrix:
    """The sums that llama.cpp's own tool collects, over whit's calibration windows.

    The model runs block by block, unquantized. UnsupportedModelError where llama.cpp has no such architecture,
    DeviceError for a device that is not there.
    """
    place = find_device(device)
    source = open_source(resolve_model(model, trust_remote_code), trust_remote_code)
    folder = source.checkpoint.folder
    architecture = architecture_of(source.model.config, str(folder))
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    text = calibration.tokens(tokenizer, maximum_context(source.model.config))
    wanted = {target.parameter for target in find_targets(source.model)}
    sums, counts = dict[str, Tensor](), dict[str, float | Tensor]()
    with torch.no_grad(), TemporaryDirectory(prefix="whit-") as scratch:
        runner = Runner(
            source.model, lambda name: read_to_run(source, source.tied.get(name, name)), text.tokens,
            place, Storage(Path(scratch)), False,
        )  # fmt: skip
        for index in range(len(runner.names)):
            with runner.loaded(index) as parameters:
                watch = Watch({name: p for name, p in parameters.items() if name in wanted}, add_gram)
                with watch:
                    runner.run(index)
                for name, stats in watch.stats().stats.items():
                    squares = [s.hessian.diagonal().to(torch.float32).cpu() for s in stats]
                    seen = [float(s.token_count) for s in stats]
                    if (tensor := architecture.tensor_name(name)) is not None and len(stats) == 1:
                        sums[tensor], counts[tensor] = squares[0], seen[0]
                    for part in architecture.stack_names(name):
                        sums[part], counts[part] = torch.stack(squares), torch.tensor(seen)
    source.checkpoint.close()
    return Imatrix(sums, counts, str(calibration.text).rpartition("/")[2], text.samples, text.context)


def weighed(job: Job, path: Path) -> Job:
    """The job with the importance of a file; RecipeError where its method does not weigh by it, or it does not fit."""
    if job.recipe is None or job.recipe.method.name != "clip":
        method = job.recipe.method.name if job.recipe is not None else "none"
        raise RecipeError(f"imatrix: method {method} does not weigh by it; clip does; use --method clip")
    architecture = architecture_of(job.source.model.config, str(job.source.checkpoint.folder))
    imatrix = read_imatrix(path)
    found = imatrix.importance(architecture)
    shapes = {item.name: item.target.shape for item in job.plan.items if item.target is not None and item.format}
    known = {name: _in_stacks(weights, shapes[name]) for name, weights in found.items() if name in shapes}
    wrong = [name for name, weights in known.items() if weights.shape != (*shapes[name][:-2], shapes[name][-1])]
    if wrong or not known:
        what = "none of the model's matrices is in it"
        if wrong:
            what = f"{wrong[0]} has {' x '.join(map(str, known[wrong[0]].shape))} columns there"
        raise RecipeError(f"{path}: {what}; it must be of this model; measure it with whit imatrix")
    job.exporter.weighed(Importance(path.name, imatrix.dataset, len(imatrix.sums), imatrix.chunks))
    shards = job.exporter.shards(job.plan.items, job.options.shard_size)
    return replace(job, importance=known, plan=replace(job.plan, shards=shards))


def _in_stacks(weights: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Those of experts, which the older file has one after another, as (experts, columns)."""
    flat = len(shape) == 3 and weights.shape == (shape[0] * shape[-1],)
    return weights.reshape(shape[0], -1) if flat else weights


def check_new(out: Path) -> None:
    """OutputError where an importance matrix cannot be written; to be asked before it is measured."""
    if out.exists():
        raise OutputError(f"{out}: exists; an importance matrix goes into a new file; choose another name")
    check_place(out)


def write_imatrix(imatrix: Imatrix, out: Path) -> None:
    """Into a new file: the older format where its name ends with .dat, else GGUF."""
    check_new(out)
    write_whole(out, dat_bytes(imatrix) if out.suffix == ".dat" else gguf_bytes(imatrix))
