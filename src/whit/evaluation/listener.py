"""Who is told how far a measurement has come, and what was decided on the way."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """The command line draws a bar from this; a library caller may pass nothing."""

    def step(self, what: str, done: int, total: int, tokens: int) -> None:
        """`done` of `total` units of `what` are scored; `tokens` went through the model in this step."""

    def note(self, sentence: str) -> None:
        """Something that the user did not ask for by name but should know."""


class Silent:
    """Hears everything and says nothing; notes still end up in the result."""

    def step(self, what: str, done: int, total: int, tokens: int) -> None:
        """Ignore it."""

    def note(self, sentence: str) -> None:
        """Ignore it."""
