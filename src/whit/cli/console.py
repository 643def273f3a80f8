"""Where words go: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console


def console() -> Console:
    """Standard error: progress, notes and tables that accompany a --json result. Brackets and colons in names
    are themselves: rich would make colours of the former, and a picture of `:x:`."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def on_screen() -> Console:
    """Standard output: the tables and lines of a result, brackets in names as they are."""
    return Console(markup=False, emoji=False, highlight=False)


def say(line: str, where: Console | None = None) -> None:
    """A line that is not folded: on standard error unless it is said where."""
    (where or console()).print(line, soft_wrap=True)


def say_error(message: str) -> None:
    """One sentence on standard error."""
    print(f"whit: {message}", file=sys.stderr)


def print_json(result: Any) -> None:
    """The result, and nothing else, on standard output."""
    print(json.dumps(result, indent=2, allow_nan=False))
