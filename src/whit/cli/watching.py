"""How far a measurement has come: a bar with tokens per second on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from whit.cli.console import say

SECONDS_BETWEEN_LINES = 10.0
B = TypeVar("B", bound="Bar")


class Bar:
    """A bar with `said` beside it on a terminal; a context manager, because it must be taken down."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._last_line = time.monotonic()

    def __enter__(self: B) -> B:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """A line above the bar."""
        say(text, self._console)

    def line_where_due(self, text: str, at_once: bool) -> None:
        """Without a terminal: a line, at once or about every ten seconds."""
        now = time.monotonic()
        if not self._console.is_terminal and (at_once or now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            self.line(text)


class Watching(Bar):
    """A Listener for the command line."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._tasks: dict[str, TaskID] = {}
        self._tokens: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._last_change = self._last_line

    def note(self, sentence: str) -> None:
        """Say it above the bar."""
        self.line(f"note: {sentence}")

    def step(self, what: str, done: int, total: int, tokens: int) -> None:
        """Move the bar; without a terminal, a line at the end and about every ten seconds."""
        now = time.monotonic()
        if what not in self._started:  # the first step ends here; it began when the one before it ended
            self._started[what], self._tokens[what] = self._last_change, 0
            self._tasks[what] = self._progress.add_task(what, total=total, said="")
        self._last_change = now
        self._tokens[what] += tokens
        speed = f"{self._tokens[what] / max(now - self._started[what], 1e-9):,.0f} tokens/s"
        self._progress.update(self._tasks[what], completed=done, said=speed)
        self.line_where_due(f"{what}: {done}/{total}, {speed}", at_once=done == total)
