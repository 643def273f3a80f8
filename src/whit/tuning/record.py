"""The content of an adapter's whit.json: from what, on what, how, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import whit
from whit.checkpoint.work import WorkFolder
from whit.checkpoint.writer import file_sha256
from whit.pipeline.coverage import load_account
from whit.training.count import count_parameters
from whit.training.loop import Entry
from whit.training.ranks import Ranks
from whit.tuning.base import BASE
from whit.tuning.job import TuningJob


def record_of_run(
    job: TuningJob, work: WorkFolder, adapted: Any, log: Sequence[Entry], seconds: float
) -> dict[str, Any]:
    """Plain values for JSON."""
    import peft
    import transformers

    trainable, total = count_parameters(adapted)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    scores = [entry["held_out_loss"] for entry in log if "held_out_loss" in entry]
    trained = [entry for entry in log if "loss" in entry]
    account = load_account(work.path / BASE) if job.tuning.calibrated else None
    base = {} if account is None else {"base": {"folder": BASE, "bits_per_weight": account.bits_per_weight}}
    last = losses[-max(len(losses) // 10, 1) :]
    return {
        "version": whit.__version__,
        "kind": "adapter",
        "source": {"model": job.model, "fingerprint": job.fingerprint},
        "seed": job.options.seed,
        "tuning": job.tuning.to_json(),
        "data": job.data.to_json(),
        "held_out": job.held_out.to_json() if job.held_out is not None else None,
        "steps": len(job.work.steps),
        "trainable_parameters": trainable,
        "parameters": total,
        "loss": {"first": losses[0], "last_tenth": sum(last) / len(last)},
        "held_out_loss": {"first": scores[0], "last": scores[-1]} if scores else None,
        "processes": Ranks.here().size,
        "device": job.device,
        "tokens_per_second": round(sum(e["tokens"] for e in trained) / sum(e["seconds"] for e in trained), 1),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": int(max(e["memory_bytes"] for e in trained)),
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        **base,
        "files": {p.name: file_sha256(p) for p in sorted(work.path.glob("adapter_*"))},
    }
