"""Tables and progress that several commands share."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from whit.cli.console import say
from whit.errors import RecipeError
from whit.pipeline.coverage import Account, Entry
from whit.spoken import of_all_blocks

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
Step = Callable[[str, int, int], None]


@contextmanager
def progress(console: Console) -> Iterator[Step]:
    """A bar on a terminal, one plain line per step otherwise."""
    if not console.is_terminal:
        yield lambda name, done, total: print(f"{done}/{total} {name}", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("")
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def show_totals(screen: Console, account: Account) -> None:
    """One row per status and format: how many, their bits per weight and their error; and all of it in one line."""
    total = f"{account.bits_per_weight:.3f} bits per weight, {account.size_bytes:,} bytes of weight files"
    say(total, screen)  # a title would be folded to the width of a small table
    table = Table()
    for column, justify in (("", "left"), ("parameters", "right"), ("bits", "right"), ("relative error", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    groups: dict[str, list[Entry]] = {}
    for entry in account.parameters:
        how = f" with {entry.activations} activations" if entry.activations else ""
        groups.setdefault((entry.format or entry.status) + how, []).append(entry)
    for name, entries in groups.items():
        bits = [e.bits_per_weight for e in entries if e.bits_per_weight is not None]
        errors = [e.relative_error for e in entries if e.relative_error is not None]
        table.add_row(name, str(len(entries)), _range(bits, ".3f"), _range(errors, ".4g") if any(errors) else "")
    screen.print(table)


def reasons(entries: Iterable[Entry]) -> Iterator[str]:
    """Why parameters were kept, tied, dropped or given another format: a line per reason and kind of name."""
    groups: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        if entry.status != "quantized" or entry.reason:
            key = (entry.status, of_all_blocks(entry.name), entry.reason or "")
            groups[key] = groups.get(key, 0) + 1
    for (status, name, reason), count in groups.items():
        yield f"{status}: {name}" + (f" ({count})" if count > 1 else "") + f": {reason}"


def counted(count: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _range(values: list[float], form: str) -> str:
    if not values:
        return ""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def parse_size(text: str) -> int:
    """`24GB` (decimal), `16GiB` (binary) or bytes, as a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise RecipeError(
            f"size {text!r}: is not an amount of memory; write a number and a unit, such as 24GB or 16GiB"
        )
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])
