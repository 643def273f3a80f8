"""Everything of a result but its weights: config.json, tokenizer, model card, and the account whit.json."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import safetensors
import torch
import transformers

import whit
from whit.checkpoint.files import side_files
from whit.checkpoint.places import RECORD, record_of
from whit.checkpoint.work import WorkFolder
from whit.checkpoint.writer import file_sha256
from whit.errors import CheckpointError
from whit.export.base import Outcome
from whit.pipeline.coverage import Account, Entry, account_bytes, load_account
from whit.pipeline.job import Job
from whit.process import peak_memory


def finish(job: Job, work: WorkFolder) -> None:
    """Write all small files into the work folder, the account last."""
    folder = job.source.checkpoint.folder
    for name, path in side_files(folder, job.options.trust_remote_code):
        if job.exporter.takes(name):
            work.write_file(name, path.read_bytes())
    for name, content in job.exporter.files(_outcome(job)).items():
        work.write_file(name, content)
    files = {shard.name: file_sha256(work.path / shard.name) for shard in job.plan.shards}
    work.write_file(RECORD, account_bytes(_account(job, work.finished, files)))


def _outcome(job: Job) -> Outcome:
    plan, source = job.plan, job.source
    config = {key: value for key, value in source.config.items() if key not in ("quantization_config", "quantization")}
    return Outcome(job.model, config, job.recipe, plan.items, source.tied, plan.bits_per_weight, plan.size_bytes)


def _account(job: Job, finished: dict[str, Any], files: dict[str, str]) -> Account:
    units = [finished[unit.name] for unit in job.plan.units]
    return Account(
        version=whit.__version__,
        recipe=job.recipe.to_dict() if job.recipe is not None else None,
        seed=job.options.seed,
        bits_per_weight=job.plan.bits_per_weight,
        size_bytes=job.plan.size_bytes,
        parameters=(*(Entry(**entry) for unit in units for entry in unit["entries"]), *_others(job)),
        seconds=round(sum(unit["seconds"] for unit in units), 3),
        peak_memory_bytes=peak_memory(),
        libraries={
            "torch": torch.__version__, "transformers": transformers.__version__,
            "safetensors": safetensors.__version__, "python": platform.python_version(),
        },
        source={"model": job.model, "fingerprint": job.fingerprint} | _history(job),
        files=files,
        calibration=job.calibration.to_json() if job.calibration is not None else None,
        export=job.exporter.name,
        decoded=_decoded([error for unit in units for error in unit.get("decoded", ())]),
        budget=job.budget,
        training=dict(job.training) or None,
    )  # fmt: skip


def _history(job: Job) -> dict[str, Any]:
    """How MODEL was made, by its own account, where whit wrote it: codes that are carried over have come from there."""
    weights = next(iter(job.source.checkpoint.shards), None)
    if weights is None:
        return {}
    try:
        account = load_account(weights if record_of(weights).is_file() else weights.parent)
    except CheckpointError:  # none there, or a damaged one: no word about MODEL
        return {}
    known = ("version", "recipe", "seed", "calibration", "source", "training")
    made = {key: value for key, value in account.to_json().items() if key in known and value is not None}
    return {"made": made | {"carried": account.carried}}


def _decoded(errors: list[float]) -> dict[str, Any] | None:
    """What an independent decoder made of the file, where there is one."""
    return {"parameters": len(errors), "largest_error": max(errors)} if errors else None


def _others(job: Job) -> Iterable[Entry]:
    """What has no bytes of its own in the result."""
    for name, owner in job.source.tied.items():
        yield Entry(name, "tied", reason=f"shares {owner}")
    for name, reason in job.source.dropped.items():
        yield Entry(name, "dropped", reason=reason)
