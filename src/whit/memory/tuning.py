"""What a planned fine-tuning takes: the fullest moment of loading, of scoring what is held out, and of a step.

Beside weights, adapters and the process itself a step holds, with n the places of its fullest micro-batch (padding
included) and t those of them whose next token counts,

    n x what autograd keeps of the blocks + t x vocabulary x 12 bytes

and a score one layer's activations and t x vocabulary x 8 bytes. The 12 are the log-softmax and two gradients in
float32, the 8 the logits in float32 and their log-softmax. Logits are made of at most `loss.CHUNK` elements at a time,
but all at once where a model scales or caps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from whit.memory.activations import kept_bytes, prefill_bytes
from whit.memory.needs import Planner, Situation, Weights
from whit.memory.subject import find_subject
from whit.training.data import Example
from whit.training.loss import CHUNK
from whit.training.packing import MULTIPLE, MicroBatch
from whit.training.settings import ALL_LINEAR
from whit.tuning.job import TuningJob

GRADIENT, SCORE = 12, 8  # bytes per logit
# Of the blocks' inputs: what malloc keeps between them for larger tensors, where other kernels than whit's in bfloat16
# make these. Measured: 2.1 to 3.7 times.
HOLES = 3
RESHAPED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_scaling")


@dataclass(frozen=True)
class Expected:
    """What is trained on, and bytes by part; `scoring_bytes` is what a score holds where a step holds activations."""

    examples: int
    held_out: int
    steps: int
    tokens: int
    response_tokens: int
    weights_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    scoring_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Fullest:
    """Of some micro-batches the most places of one, padding included, and the most of them that are predicted."""

    places: int = 0
    targets: int = 0

    @staticmethod
    def of(batches: Sequence[MicroBatch], examples: tuple[Example, ...]) -> Fullest:
        """None of them: nothing."""
        return Fullest(
            max((_places(rows, examples) for rows in batches), default=0),
            max((sum(examples[i].targets for row in rows for i in row) for rows in batches), default=0),
        )


def _places(rows: MicroBatch, examples: tuple[Example, ...]) -> int:
    longest = max(sum(len(examples[i].tokens) for i in row) for row in rows)
    return len(rows) * -(-longest // MULTIPLE) * MULTIPLE


def estimate_tuning(job: TuningJob) -> Expected:
    """From headers, configuration and plan; no weight is read. Time is measured when the model is there."""
    tuning, work = job.tuning, job.work
    dtype: torch.dtype = getattr(torch, tuning.dtype)
    planner = _planner(job)
    weights = planner.weights(tuning.format) if tuning.format else planner.stored() or planner.weights(tuning.dtype)
    need = planner.need(weights, checkpointing=tuning.checkpointing)
    rows = [rows for step in work.steps for rows in step]
    step, score = Fullest.of(rows, work.examples), Fullest.of(work.scored, work.held_out)
    activations = step.places * kept_bytes(planner.widths, dtype, tuning.checkpointing)
    if planner.situation.device == "cpu" and not (weights.packed and dtype == torch.bfloat16):
        activations += HOLES * step.places * planner.widths.layers * planner.widths.hidden * dtype.itemsize
    activations += _head_bytes(planner, step, GRADIENT, 2 * dtype.itemsize)
    scoring = 0
    if work.scored:
        scoring = prefill_bytes(planner.widths, score.places, 1, dtype)
        scoring += _head_bytes(planner, score, SCORE, dtype.itemsize)
    held = need.weights_bytes + _widened(planner, weights, dtype)
    return Expected(
        examples=len(work.examples), held_out=len(work.held_out), steps=len(work.steps),
        tokens=sum(map(work.tokens, rows)), response_tokens=sum(map(work.targets, work.steps)),
        weights_bytes=held, optimizer_bytes=need.optimizer_bytes, activations_bytes=activations, scoring_bytes=scoring,
        total_bytes=need.overhead_bytes + held + need.optimizer_bytes + max(activations, scoring),
    )  # fmt: skip


def _planner(job: TuningJob) -> Planner:
    tuning = job.tuning
    subject = find_subject(str(job.folder), job.options.trust_remote_code)
    linears = {
        n.rpartition(".")[2] for n, p in subject.model.named_modules() if type(p).__name__ in ("Linear", "Conv1D")
    }
    names = tuple(sorted(linears - {"lm_head"})) if tuning.targets == (ALL_LINEAR,) else tuning.targets
    device = "cuda" if job.device.startswith("cuda") else "cpu"
    assert tuning.context is not None
    situation = Situation(tuning.context, tuning.batch, device=device, train="lora", rank=tuning.rank, targets=names)
    return Planner(subject, situation)


def _head_bytes(planner: Planner, fullest: Fullest, each: int, whole: int) -> int:
    """Of the logits: `each` byte of those that count; `whole` of all places' where these are made at once."""
    vocabulary, config = planner.widths.vocabulary, planner.subject.config
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in RESHAPED):
        return vocabulary * (fullest.targets * each + fullest.places * whole)
    return min(fullest.targets * vocabulary, CHUNK) * each


def _widened(planner: Planner, weights: Weights, dtype: torch.dtype) -> int:
    """Bytes more than in a file of the format asked for that what stays floats takes in the computation's dtype."""
    packed = {target.parameter for target in weights.packed}
    kept = [o.spec for name, o in planner.subject.source.origins.items() if packed and name not in packed]
    return sum(prod(spec.shape) * dtype.itemsize - spec.nbytes for spec in kept if spec.dtype.is_floating_point)
