"""A planned run done: loaded, trained, saved on the way, and written as one folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from whit.checkpoint.places import RECORD
from whit.checkpoint.reader import read_json
from whit.checkpoint.work import JOURNAL, WorkFolder, disk_errors, is_done
from whit.errors import OutputError, WhitError
from whit.integrations.config import QuantizationConfig
from whit.integrations.loading import load_causal_lm
from whit.process import give_back_freed, peak_memory
from whit.spoken import duration
from whit.training.adapters import adapters, add_adapters, check_packing
from whit.training.count import count_parameters
from whit.training.curve import draw_curve
from whit.training.init import initialize_adapter
from whit.training.loop import Entry, Loop, Watcher
from whit.training.loss import ResponseLoss
from whit.training.optimizers import make_optimizer
from whit.training.packing import derive
from whit.training.ranks import Ranks
from whit.training.settings import DEFAULT_INIT
from whit.training.shards import shard_packed
from whit.training.state import load_state, save_state
from whit.tuning.base import BASE, base_folder, forget_start, make_base, seen, set_start
from whit.tuning.job import TuningJob
from whit.tuning.record import record_of_run

LOG = "training.jsonl"
CURVE = "loss.png"
CHECKPOINT = "checkpoint-{}.safetensors"
CHECKPOINTS = 20  # in a run, where it is not said how often


def run_tuning(job: TuningJob, watcher: Watcher | None = None) -> dict[str, Any]:
    """Do a planned run, or resume it; returns the content of whit.json."""
    if is_done(job.out, job.fingerprint, job.options.restart):
        return read_json(job.out / RECORD)
    ranks = Ranks.here()
    work = WorkFolder(job.out, job.fingerprint, job.options.restart) if ranks.first else None
    try:
        with disk_errors(job.out):
            if work is None or not work.complete:
                _train(job, ranks, work, watcher)
            if work is not None:
                _commit(work)
    except WhitError:
        if work is not None and not work.finished:  # nothing is lost, and other settings can be tried at once
            shutil.rmtree(work.path, ignore_errors=True)
        raise
    finally:
        if work is not None:
            work.close()
    ranks.wait()
    return read_json(job.out / RECORD)


def _commit(work: WorkFolder) -> None:
    """The journal goes first: from there on the next run only has to do the rest of this."""
    (work.path / JOURNAL).unlink(missing_ok=True)
    forget_start(work.path)
    for path in work.path.glob(CHECKPOINT.format("*")):
        path.unlink()
    work.commit()


def _train(job: TuningJob, ranks: Ranks, work: WorkFolder | None, watcher: Watcher | None) -> None:
    began = time.perf_counter()
    make_base(job, ranks, None if watcher is None else _quantized(watcher))
    loop, adapted = build_loop(job, ranks)
    log, content = _resumed(work) if work is not None else ([], None)
    content = ranks.share(content, loop.device)
    done = load_state(content, loop.model, loop.optimizer) if content is not None else 0
    expected = loop.trial() if not done and (watcher is not None or ranks.size > 1) else None
    if watcher is not None:
        _introduce(watcher, job, adapted, done, expected)
    every = job.save_every or max(len(job.work.steps) // CHECKPOINTS, 1)
    for entries in loop.steps(done):
        log += entries
        for entry in entries if watcher is not None else ():
            _tell(watcher, entry, len(job.work.steps))  # type: ignore[arg-type]
        number = int(entries[0]["step"])
        if work is not None and number and number % every == 0 and number < len(job.work.steps):
            _save(work, loop, number, log)
    if work is not None:
        _write(job, work, adapted, log, time.perf_counter() - began)


def _introduce(watcher: Watcher, job: TuningJob, adapted: Any, done: int, expected: float | None) -> None:
    """What is about to be trained, and how long it will take."""
    for note in job.notes:
        watcher.note(note)
    trainable, total = count_parameters(adapted)
    share = 100 * trainable / total
    watcher.note(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")
    steps = len(job.work.steps)
    if expected is None:
        watcher.note(f"goes on after step {done} of {steps}")
    else:
        watcher.note(
            f"about {duration(expected)} for {steps} step{'' if steps == 1 else 's'}, by a trial of the fullest batch"
        )


def _quantized(watcher: Watcher) -> Callable[[str, int, int], None]:
    def told(unit: str, done: int, total: int) -> None:
        watcher.note(f"quantizing {unit}: {done} of {total}")

    return told


def build_loop(job: TuningJob, ranks: Ranks) -> tuple[Loop, Any]:
    """The model loaded, quantized where asked, with adapters on it, and the loop around it; and PEFT's model.

    Where calibration chooses the codes, `make_base` has to have written them.
    """
    tuning, quantization = job.tuning, None
    if tuning.format is not None and not tuning.calibrated:
        quantization = QuantizationConfig(tuning.format, method=tuning.method)
    folder = base_folder(job) if tuning.calibrated else job.folder
    model = load_causal_lm(
        str(folder), device=job.device, dtype=tuning.dtype, quantization=quantization,
        trust_remote_code=job.options.trust_remote_code,
    )  # fmt: skip
    if tuning.packing:
        check_packing(model)
    adapted = add_adapters(model, tuning, derive(job.options.seed, "adapter"))
    if tuning.calibrated:
        adapted.peft_config["default"].base_model_name_or_path = str(job.out / BASE)
    elif job.hub is not None:  # the cache's folder is on this machine alone
        adapted.peft_config["default"].base_model_name_or_path = job.hub.repo
        adapted.peft_config["default"].revision = job.hub.revision
    if tuning.calibrated:
        set_start(job, adapted)
    elif tuning.init != DEFAULT_INIT:
        initialize_adapter(adapted, job.folder, method=tuning.init, calibration=seen(job))
    model.eval()
    loss = ResponseLoss.of(model)
    parameters = adapters(model)
    optimizer = make_optimizer(tuning.optimizer, parameters, tuning.learning_rate, tuning.weight_decay)
    if tuning.shard:
        ranks = shard_packed(model, ranks)
    on_gpu = job.device.startswith("cuda")
    give_back_freed()

    def memory() -> int:
        return int(torch.cuda.max_memory_allocated(job.device)) if on_gpu else peak_memory()

    return Loop(model, parameters, optimizer, loss, job.work, tuning, job.options.seed, ranks, memory), adapted


def _resumed(work: WorkFolder) -> tuple[list[Entry], bytes | None]:
    """The log and the checkpoint of an earlier run, as far as it came; nothing where the journal's line is damaged."""
    saved = {int(record["step"]): work.path / record["file"] for record in work.finished.values()}
    saved = {step: path for step, path in saved.items() if path.is_file()}
    if not saved:
        return [], None
    last = max(saved)
    try:
        log = [json.loads(line) for line in (work.path / LOG).read_text().splitlines()]
        return [entry for entry in log if entry["step"] <= last], saved[last].read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{work.path / LOG}: damaged; it must be as an earlier run left it; pass --restart to begin again"
        ) from None


def _save(work: WorkFolder, loop: Loop, step: int, log: list[Entry]) -> None:
    """Log and checkpoint on the disk, then the journal's line, then the checkpoint before it goes."""
    name = CHECKPOINT.format(step)
    work.write_file(LOG, _lines(log))
    work.write_file(name, save_state(loop.model, loop.optimizer, step))
    work.record(name, {"step": step, "file": name})
    for path in work.path.glob(CHECKPOINT.format("*")):
        if path.name != name:
            path.unlink()


def _write(job: TuningJob, work: WorkFolder, adapted: Any, log: list[Entry], seconds: float) -> None:
    """Everything that OUT holds, the record last."""
    adapted.save_pretrained(work.path, safe_serialization=True, save_embedding_layers=False)
    for path in work.path.glob("adapter_*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    work.write_file(LOG, _lines(log))
    picture = draw_curve(log, f"{job.model}, {job.tuning.format or job.tuning.dtype}")
    if picture is not None:
        work.write_file(CURVE, picture)
    record = json.dumps(record_of_run(job, work, adapted, log, seconds), indent=1, allow_nan=False)
    work.write_file(RECORD, (record + "\n").encode())


def _tell(watcher: Watcher, entry: Entry, steps: int) -> None:
    if "held_out_loss" in entry:
        watcher.scored(entry)
    else:
        watcher.step(entry, steps)


def _lines(log: list[Entry]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in log).encode()
