"""Quantization-aware training of whole models; that of one block after the other is the method `blocks`."""

from __future__ import annotations

from whit.qat.course import Course
from whit.qat.job import OWN_TEXT, Setting, Training, Words, prepare_full, prepare_scales
from whit.qat.run import finish, learn, train

__all__ = [
    "OWN_TEXT", "Course", "Setting", "Training", "Words", "finish", "learn", "prepare_full", "prepare_scales", "train",
]  # fmt: skip
