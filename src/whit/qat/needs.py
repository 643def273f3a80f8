"""What end-to-end training will hold in memory, before a weight is read.

Per trained element: master, gradient and two averages in float32; for every quantized weight what it is decoded to and
its gradient in the dtype of the computation (in float32 where several parts are added up), and a byte for its code.
Beside them the model, a teacher where it is another one, and what a backward pass keeps of the windows run together.
"""

from __future__ import annotations

from math import prod

import torch

from whit.memory.activations import training_bytes, widths
from whit.methods.joined import JOINED
from whit.process import peak_memory
from whit.qat.job import Training
from whit.qat.losses import CHUNK

STATE = 16  # bytes per trained element
WORK = 40  # bytes per weight of the largest matrix, or of those joined, while it is decoded and led back


def memory_bytes(training: Training, context: int) -> int:
    """Bytes at the fullest moment, on the device that computes."""
    job, course = training.job, training.course
    size = training.dtype.itemsize
    quantized = [item for item in job.plan.items if item.format is not None]
    weights = sum(prod(item.spec.shape) for item in quantized)
    kept = sum(prod(item.spec.shape) for item in job.plan.items if item.format is None)
    full = training.mode == "full"
    learned = (weights if full else 0) + (kept if course.kept_rate else 0)
    packed = sum(spec.nbytes for item in quantized for spec in item.written.values())
    on_cpu = job.device.type == "cpu"
    several = on_cpu or course.batch > course.at_once
    decoded = weights + (kept if course.kept_rate else 0)
    model = size * (kept + (weights if full else 0)) + (packed if not full else weights)
    teacher = size * (weights + kept) if training.setting.teacher is not None and course.needs_teacher else 0
    largest = max((prod(item.spec.shape) for item in quantized), default=0)
    if not on_cpu:
        largest = max(largest, min(JOINED, weights))
    at_once = torch.get_num_threads() if on_cpu else course.at_once
    wide = widths(job.source.model.config.get_text_config(), job.source.model)
    running = training_bytes(wide, context, min(at_once, course.batch), training.dtype, False)
    gradients = (size + (4 if several else 0)) * decoded
    own = peak_memory() if on_cpu else 0
    return own + model + teacher + STATE * learned + size * decoded + gradients + running + WORK * largest + 12 * CHUNK
