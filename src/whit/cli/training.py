"""What `whit finetune` shows: what a run is going to take, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from whit.cli.console import print_json
from whit.cli.shown import counted
from whit.cli.watching import Bar
from whit.memory import Planner, Situation
from whit.memory.subject import find_subject
from whit.spoken import size
from whit.training.loss import CHUNK
from whit.training.settings import ALL_LINEAR
from whit.tuning import TuningJob


@dataclass(frozen=True)
class Expected:
    """Bytes by part, as `whit memory --train` counts them, and what is trained on."""

    examples: int
    held_out: int
    steps: int
    tokens: int
    response_tokens: int
    weights_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    total_bytes: int

    @property
    def sentence(self) -> str:
        """One line for people."""
        return (
            f"{counted(self.examples, 'example')}, {counted(self.steps, 'step')} over {self.tokens:,} tokens, "
            f"{self.response_tokens:,} of "
            f"them responses; about {size(self.total_bytes)} of memory ({size(self.weights_bytes)} weights, "
            f"{size(self.optimizer_bytes)} adapters and optimizer, {size(self.activations_bytes)} activations)"
        )


def estimate(job: TuningJob) -> Expected:
    """From headers, configuration and plan; no weight is read. Time is measured when the model is there."""
    tuning = job.tuning
    subject = find_subject(str(job.folder), job.options.trust_remote_code)
    linears = {
        n.rpartition(".")[2] for n, p in subject.model.named_modules() if type(p).__name__ in ("Linear", "Conv1D")
    }
    names = tuple(sorted(linears - {"lm_head"})) if tuning.targets == (ALL_LINEAR,) else tuning.targets
    device = "cuda" if job.device.startswith("cuda") else "cpu"
    assert tuning.context is not None
    situation = Situation(tuning.context, tuning.batch, device=device, train="lora", rank=tuning.rank, targets=names)
    planner = Planner(subject, situation)
    weights = planner.weights(tuning.format) if tuning.format else planner.stored() or planner.weights(tuning.dtype)
    need = planner.need(weights, checkpointing=tuning.checkpointing)
    # `whit memory` counts the logits of every position; here they are made a chunk at a time.
    vocabulary, size_of = planner.widths.vocabulary, 2 * subject.dtype.itemsize + 8
    logits = tuning.batch * tuning.context * vocabulary
    saved = (logits - min(logits, CHUNK)) * size_of
    rows = [rows for step in job.work.steps for rows in step]
    return Expected(
        examples=len(job.work.examples), held_out=len(job.work.held_out), steps=len(job.work.steps),
        tokens=sum(map(job.work.tokens, rows)), response_tokens=sum(map(job.work.targets, job.work.steps)),
        weights_bytes=need.weights_bytes, optimizer_bytes=need.optimizer_bytes,
        activations_bytes=need.activations_bytes - saved, total_bytes=need.total_bytes - saved,
    )  # fmt: skip


def show_plan(job: TuningJob, expected: Expected | None, as_json: bool) -> None:
    """The plan on standard output."""
    assert expected is not None
    if as_json:
        print_json({**asdict(expected), "tuning": job.tuning.to_json(), "notes": list(job.notes)})
        return
    for line in (expected.sentence, *(f"note: {note}" for note in job.notes)):
        print(line)


class Progress(Bar):
    """A bar with loss, tokens per second and memory on a terminal, plain lines otherwise."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._task = self._progress.add_task("training", total=None, said="")
        self._last_line = 0.0  # the first step has a line

    def note(self, sentence: str) -> None:
        """Say it above the bar."""
        self.line(sentence)

    def step(self, entry: Mapping[str, Any], steps: int) -> None:
        """Move the bar; without a terminal a line about every ten seconds, and at the first and last step."""
        number = int(entry["step"])
        said = f"loss {entry['loss']:.4f}, {entry['tokens_per_second']:,.0f} tokens/s, {size(entry['memory_bytes'])}"
        self._progress.update(self._task, completed=number, total=steps, said=said)
        self.line_where_due(f"step {number}/{steps}: {said}", at_once=number == steps)

    def scored(self, entry: Mapping[str, Any]) -> None:
        """A line for every score."""
        self.line(f"step {int(entry['step'])}: held-out loss {entry['held_out_loss']:.4f}")
