"""What `whit finetune` shows: what a run is going to take, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console

from whit.cli.console import print_json
from whit.cli.shown import counted
from whit.cli.watching import Bar
from whit.memory.tuning import Expected
from whit.spoken import size
from whit.tuning import TuningJob


def sentence(expected: Expected) -> str:
    """What a run is going to take, in one line."""
    e = expected
    scoring = f", {size(e.scoring_bytes)} where it scores" if e.scoring_bytes > e.activations_bytes else ""
    return (
        f"{counted(e.examples, 'example')}, {counted(e.steps, 'step')} over {e.tokens:,} tokens, "
        f"{e.response_tokens:,} of them responses; about {size(e.total_bytes)} of memory "
        f"({size(e.weights_bytes)} weights, {size(e.optimizer_bytes)} adapters and optimizer, "
        f"{size(e.activations_bytes)} activations{scoring})"
    )


def show_plan(job: TuningJob, expected: Expected | None, as_json: bool) -> None:
    """The plan on standard output."""
    assert expected is not None
    if as_json:
        print_json({**asdict(expected), "tuning": job.tuning.to_json(), "notes": list(job.notes)})
        return
    for line in (sentence(expected), *(f"note: {note}" for note in job.notes)):
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
