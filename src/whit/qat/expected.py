"""What end-to-end training will take before a weight is read: seconds from small trials on this machine, and memory.

Time is that of the start, by its own estimate, of text that the model writes itself, of the steps, and of the disk.
A step is products of its tokens with the model's matrices (forwards, twice as much backwards, once more for a teacher),
the losses over its logits, and, whatever the tokens are, every weight decoded, led back and moved. A trial of each on
random numbers says what one of it takes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch

from whit.memory.activations import Widths, widths
from whit.methods import RTN
from whit.methods.lowrank import beside
from whit.model.graph import find_blocks
from whit.pipeline.estimate import TRIAL, Estimate, active_weights, estimate, parts_of
from whit.qat.job import OWN_TEXT, Training
from whit.qat.losses import divergence, text_loss
from whit.qat.needs import memory_bytes
from whit.qat.start import mover
from whit.tensor import Format

ROWS = 512  # tokens in a trial
AROUND = 1.5  # a pass over that of its products: norms, softmax, rotations
SECONDS = 0.05  # that a trial takes at least
CALL = 5e-4  # seconds that Python takes to have one token of a window pass a block
WINDOWS_ON_GPU = 64  # that write side by side


def expect(training: Training) -> Estimate:
    """Seconds and peak memory of a prepared run from its beginning to its end."""
    job, begin, words = training.job, training.begin, training.words
    written = estimate(replace(job, recipe=None))  # what it reads and writes
    steps = training.course.steps * step_seconds(training)
    if training.course.seconds is not None:
        steps = min(steps, training.course.seconds)
    tokens = words.windows * training.context if training.tokens is None else 0
    seconds = written.seconds + steps + writing_seconds(training, tokens)
    memory = memory_bytes(training, training.context)
    if begin is None:
        return Estimate(seconds, memory, written.disk_bytes)
    start = estimate(begin)
    seconds += start.seconds + (writing_seconds(training, begin.calibration.count) if begin.calibration else 0)
    return Estimate(seconds, max(memory, start.memory_bytes), written.disk_bytes, start.inputs_bytes)


def step_seconds(training: Training) -> float:
    """Seconds of one step."""
    course, wide = training.course, _widths(training)
    threads = torch.get_num_threads() if training.job.device.type == "cpu" else 1
    tokens, alone = course.batch * training.context, max(threads / course.batch, 1.0)  # a thread has a window
    passes = 3 + course.needs_teacher
    return (
        alone * tokens * (passes * _pass_seconds(training) + _loss_seconds(training, wide)) + _moved(training) / threads
    )


def _pass_seconds(training: Training) -> float:
    """Seconds for one token to pass the model forwards, among many."""
    wide = _widths(training)
    products = 2 * _weights(training) + 4 * training.context * wide.query * wide.layers
    x = torch.ones(min(ROWS, training.context), wide.hidden, dtype=training.dtype, device=training.job.device)
    weight = torch.ones(wide.hidden, max(wide.intermediate, wide.hidden), dtype=x.dtype, device=x.device)
    return AROUND * products / (2 * len(x) * weight.numel()) * timed(lambda: x @ weight, training.job.device)


def writing_seconds(training: Training, tokens: int) -> float:
    """Seconds for the model to write so many tokens, where it writes its own text: one after the other, each a product
    with each weight and Python's part."""
    if training.words.text != OWN_TEXT:
        return 0.0
    wide, on_cpu = _widths(training), training.job.device.type == "cpu"
    x = torch.ones(1 if on_cpu else WINDOWS_ON_GPU, wide.hidden, dtype=training.dtype, device=training.job.device)
    weight = torch.ones(max(wide.intermediate, wide.hidden), wide.hidden, dtype=x.dtype, device=x.device)
    each = timed(lambda: x @ weight.t(), training.job.device)
    return tokens * (CALL * wide.layers + each * _weights(training) / weight.numel()) / len(x)


def _loss_seconds(training: Training, wide: Widths) -> float:
    """Seconds for the losses over one token's logits, and their gradients."""
    rows = max(min(ROWS, TRIAL // max(wide.vocabulary, 1)), 1)
    logits = torch.zeros(rows, max(wide.vocabulary, 1), dtype=training.dtype, device=training.job.device)
    own, targets = logits.clone().requires_grad_(), torch.zeros(rows, dtype=torch.int64, device=logits.device)
    course, total = training.course, 0.0
    with torch.enable_grad():
        if course.distill:
            total += timed(lambda: divergence(own, logits).backward(), logits.device)  # type: ignore[no-untyped-call]
        if course.text:
            total += timed(lambda: text_loss(own, targets).backward(), logits.device)  # type: ignore[no-untyped-call]
    return total / rows


def _moved(training: Training) -> float:
    """Seconds of one thread for decoding, leading back and moving everything once."""
    weights: Counter[tuple[Format, int]] = Counter()
    for item in training.job.plan.items:
        if item.format is not None and item.target is not None:
            columns = item.target.shape[-1]
            for form, rows in parts_of(item.format, prod(item.target.shape[:-1])):
                weights[form, columns] += rows * columns
    return sum(count * _moved_seconds(training, form, columns) for (form, columns), count in weights.items())


def _moved_seconds(training: Training, format: Format, columns: int) -> float:
    """Seconds per weight of this format."""
    rows, device = max(TRIAL // columns // 4, 1), training.job.device
    with torch.no_grad():
        weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(0)).to(device)
        moving = mover(training)(weight, beside(RTN())(weight, None, format))
        optimizer = torch.optim.AdamW(moving.variables.values(), lr=0.0) if moving.variables else None

        def move() -> None:
            gradients = moving.gradients(moving.decode())
            for key, value in moving.variables.items():
                value.grad = gradients[key]
            if optimizer is not None:
                optimizer.step()
            moving.confine()

        return timed(move, device) / (rows * columns)


def timed(do: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the first one aside."""
    count = -1
    start = time.perf_counter()
    while count < 1 or time.perf_counter() - start < SECONDS:
        do()
        _wait(device)
        count += 1
        start = start if count else time.perf_counter()
    return (time.perf_counter() - start) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weights(training: Training) -> float:
    """Weights that a token meets: those of the blocks, and the head's."""
    wide, blocks = _widths(training), find_blocks(training.job.source.model).names
    inside = (i for i in training.job.plan.items if i.target and any(i.name.startswith(f"{n}.") for n in blocks))
    return sum(active_weights(training.job, item) for item in inside) + wide.hidden * wide.vocabulary


def _widths(training: Training) -> Widths:
    model = training.job.source.model
    return widths(model.config.get_text_config(), model)
