"""How far a measurement has come: a bar with tokens per second on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class Watching:
    """A Listener for the command line; a context manager, because the bar must be taken down."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._tokens: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._last_change = time.monotonic()
        self._last_line = self._last_change

    def __enter__(self) -> Watching:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, sentence: str) -> None:
        """Say it above the bar."""
        self._console.print(f"note: {sentence}", highlight=False, markup=False, soft_wrap=True)

    def step(self, what: str, done: int, total: int, tokens: int) -> None:
        """Move the bar; without a terminal, a line at the end and about every ten seconds."""
        now = time.monotonic()
        if what not in self._started:  # the first step ends here; it began when the one before it ended
            self._started[what], self._tokens[what] = self._last_change, 0
            self._tasks[what] = self._progress.add_task(what, total=total, speed="")
        self._last_change = now
        self._tokens[what] += tokens
        speed = f"{self._tokens[what] / max(now - self._started[what], 1e-9):,.0f} tokens/s"
        self._progress.update(self._tasks[what], completed=done, speed=speed)
        if not self._console.is_terminal and (done == total or now - self._last_line > _SECONDS_BETWEEN_LINES):
            self._last_line = now
            self._console.print(f"{what}: {done}/{total}, {speed}", highlight=False, markup=False, soft_wrap=True)
