"""`whit.finetune`: an adapter trained beside a model's weights, packed or not, and written as PEFT reads it.

OUT appears when it is complete: the adapter, whit.json (from what, on what, how, how well), training.jsonl (a line per
step), loss.png. A killed run goes on from its last checkpoint and ends with the same bytes. Under torchrun or
accelerate launch every process runs this, with torch.distributed set up; the first one writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whit.errors import TrainingError
from whit.named import require
from whit.pipeline.job import Options
from whit.training.loop import Watcher
from whit.training.settings import Tuning
from whit.tuning.job import TuningJob, prepare_tuning
from whit.tuning.run import run_tuning

__all__ = ["TuningJob", "finetune", "prepare_tuning", "run_tuning"]


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    tuning: Tuning | None = None,
    *,
    held_out: str | Path | None = None,
    options: Options | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train an adapter on a .jsonl file of instructions; returns the content of its whit.json.

    `held_out` is another such file that is scored during training, instead of a share of `data`. Raises TrainingError
    for data and settings, and what loading, formats and the output folder raise.
    """
    require(tuning, Tuning | None, "tuning", "it must be whit.Tuning(rank=..., ...); give one", TrainingError)
    return run_tuning(prepare_tuning(model, data, out, tuning or Tuning(), held_out, options or Options()), watcher)
