"""Both phases of EfficientQAT (Chen et al. 2024) as one run: blocks trained one by one, then all scales end to end.

The first phase's model lies in `.OUT.blocks` until the second is done. The account of OUT is that of one run from the
unquantized model: its name, the recipe and the text of the first phase, errors of what is written from its weights.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from whit.checkpoint.work import is_done, recorded_fingerprint
from whit.pipeline.coverage import load_account
from whit.pipeline.job import Job
from whit.qat.course import Course
from whit.qat.job import Setting, Training, Words, prepare_scales, told_of_scales

BLOCKS = "blocks"  # in a run's `training`: the fingerprint of the first phase


def place_of_blocks(out: Path) -> Path:
    """Where the first phase's model lies."""
    return out.parent / f".{out.name}.blocks"


def prepare_second(blocks: Job, asked: str, out: Path, course: Course, words: Words, setting: Setting) -> Training:
    """Plan the second phase behind a first one that is done; `asked` is its fingerprint as it was asked for, before
    the model had written any text of its own."""
    training = prepare_scales(blocks.out, out, course, words, setting)
    told = {**training.job.training, BLOCKS: asked}
    job = replace(training.job, model=blocks.model, recipe=blocks.recipe, calibration=blocks.calibration, training=told)
    return replace(training, job=job, exact=blocks.source)


def both_done(blocks: Job, out: Path, second: Training) -> bool:
    """Whether OUT holds what both phases give, though the first one's model is gone; OutputError where it holds
    something else."""
    setting = second.setting
    if blocks.out.exists() or not out.exists() or setting.options.restart:
        return False
    if recorded_fingerprint(out) is not None:
        account = load_account(out)
        wanted = json.dumps({**told_of_scales(second), BLOCKS: blocks.fingerprint})
        if account.training == json.loads(wanted) and account.export == setting.export:
            return True
    return is_done(out, blocks.fingerprint, False)
