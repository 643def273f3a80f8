"""Everything of a result but its weights: config.json, tokenizer, model card, and the account whit.json."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Iterable
from typing import Any

import safetensors
import torch
import transformers

import whit
from whit.checkpoint.files import side_files
from whit.checkpoint.reader import read_json
from whit.checkpoint.work import RECORD, WorkFolder
from whit.checkpoint.writer import file_sha256
from whit.coverage import Account, Entry, account_bytes
from whit.export.whit import CARD, quantization_config
from whit.job import Job

DENSE_CARD = """# {name}, in bfloat16

Written by `whit convert --export bf16`: a plain transformers checkpoint. `whit.json` says where each parameter is from.
"""


def finish(job: Job, work: WorkFolder) -> None:
    """Write all small files into the work folder, the account last."""
    folder = job.source.checkpoint.folder
    for name, path in side_files(folder, job.options.trust_remote_code):
        work.write_file(name, path.read_bytes())
    work.write_file("config.json", _json(_config(job)))
    work.write_file("README.md", _card(job).encode())
    files = {shard.name: file_sha256(work.path / shard.name) for shard in job.plan.shards}
    work.write_file(RECORD, account_bytes(_account(job, work.finished, files)))


def _config(job: Job) -> dict[str, Any]:
    """The model's config.json with what was done to it."""
    config = read_json(job.source.checkpoint.folder / "config.json")
    config.pop("quantization_config", None)
    if job.recipe is not None:
        return {**config, "quantization_config": quantization_config(job.recipe, job.plan.formats)}
    config.pop("torch_dtype", None)  # its older name
    return {**config, "dtype": "bfloat16"}


def _card(job: Job) -> str:
    name = job.model.rpartition("/")[2]
    if job.recipe is None:
        return DENSE_CARD.format(name=name)
    return CARD.format(name=name, bits_per_weight=job.plan.bits_per_weight, size_bytes=job.plan.size_bytes)


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
        source={"model": job.model, "fingerprint": job.fingerprint},
        files=files,
        calibration=job.calibration.to_json() if job.calibration is not None else None,
    )  # fmt: skip


def _others(job: Job) -> Iterable[Entry]:
    """What has no bytes of its own in the result."""
    for name, owner in job.source.tied.items():
        yield Entry(name, "tied", reason=f"shares {owner}")
    for name, reason in job.source.dropped.items():
        yield Entry(name, "dropped", reason=reason)


def peak_memory() -> int:
    """Most bytes that this process has held in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
