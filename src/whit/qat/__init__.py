"""Quantization-aware training of whole models; that of one block after the other is the method `blocks`.

`job` plans a run, `start` makes what it begins with, `run` does it: a `loop` over a `network` whose parameters are
`trained`, by the `losses` of a `course`; `ready` hands the result to the pipeline.
"""

from __future__ import annotations

from whit.qat.course import Course
from whit.qat.job import OWN_TEXT, Setting, Training, Words, prepare_full, prepare_scales
from whit.qat.run import finish, learn, train

__all__ = [
    "OWN_TEXT", "Course", "Setting", "Training", "Words", "finish", "learn", "prepare_full", "prepare_scales", "train",
]  # fmt: skip
