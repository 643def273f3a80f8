"""The comparison as a table: what every column is called, says, sorts by and means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
NONE = "–"


@dataclass(frozen=True)
class Column:
    """`value` gives what a row is sorted by (None: not measured), `show` its text, `help` a sentence about it."""

    title: str
    help: str
    value: Callable[[Row], Any]
    show: Callable[[Row], str]
    is_text: bool = False

    def cell(self, row: Row) -> str:
        """The text; a dash where it was not measured."""
        return NONE if self.value(row) is None else self.show(row)


def _number(title: str, key: str, form: str, help: str, scale: float = 1.0) -> Column:
    return Column(title, help, lambda row: row.get(key), lambda row: format(row[key] * scale, form))


def _kl(row: Row) -> str:
    low, high = row["kl"]["ci95"]
    return f"{row['kl']['mean']:.5f} ±{(high - low) / 2:.5f}"


def _relative(title: str, key: str, form: str, help: str) -> Column:
    return Column(
        title, help, lambda row: row.get("relative", {}).get(key), lambda row: format(row["relative"][key], form)
    )


def _spread(title: str, key: str, help: str) -> Column:
    def show(row: Row) -> str:
        found = row[key]
        half = max(found["high"] - found["median"], found["median"] - found["low"])
        return f"{found['median']:.1f} ±{half:.1f}"

    return Column(title, help, lambda row: row[key]["median"] if key in row else None, show)


def _task(name: str) -> Column:
    def show(row: Row) -> str:
        task = row["tasks"][name]
        error = f" ±{100 * task['stderr']:.1f}" if task["stderr"] is not None else ""
        return f"{100 * task['accuracy']:.1f}{error}"

    help = f"zero-shot accuracy on {name}, per cent, with its standard error"
    return Column(f"{name} %", help, lambda row: row.get("tasks", {}).get(name, {}).get("accuracy"), show)


FIXED = (
    Column("candidate", "method:format, checkpoint or library:format", lambda r: r["candidate"],
           lambda r: r["candidate"], is_text=True),
    _number("bits/weight", "bits_per_weight", ".2f", "every byte of the weight files, over every parameter"),
    _number("MB", "size_bytes", ".1f", "size of the weight files", 1e-6),
    _relative("size", "size", ".3f", "size over the original's"),
    _number("loaded MB", "memory_loaded_bytes", ".0f", "memory that the loaded model adds to the process", 1e-6),
    _number("peak MB", "memory_peak_bytes", ".0f", "most memory of the whole process while it loads and writes", 1e-6),
    _number("perplexity", "perplexity", ".3f", "on the text; lower is better"),
    _relative("change", "perplexity_change", "+.2%", "of the perplexity, against the original"),
    Column("KL", "mean divergence from the original, nats per token, with 95 % interval",
           lambda r: r["kl"]["mean"] if r.get("kl") else None, _kl),
    Column("top-1 %", "how often the likeliest next token is the original's",
           lambda r: r.get("top1_agreement"), lambda r: f"{100 * r['top1_agreement']:.2f}"),
)  # fmt: skip
SPEED = (
    _spread("prefill tok/s", "prefill", "tokens of a prompt read in a second, batch 1; median and spread"),
    _spread("decode tok/s", "decode", "tokens written in a second, batch 1; median and spread"),
    _relative("decode x", "decode", ".2f", "speed of writing over the original's"),
    _number("J/token", "joules_per_token", ".3f", "energy of the device for a token written"),
)
MADE = (
    Column("quantize s", "seconds to quantize; of a library that does it while loading, to load",
           lambda r: r.get("made", {}).get("seconds"), lambda r: f"{r['made']['seconds']:.1f}"),
    Column("CPU s", "processor seconds of the same, whatever else the machine did",
           lambda r: r.get("made", {}).get("cpu_seconds"), lambda r: f"{r['made']['cpu_seconds']:.1f}"),
)  # fmt: skip


def columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns that at least one row has a figure in."""
    tasks = dict.fromkeys(name for row in rows for name in row.get("tasks", {}))
    every = (*FIXED, *(_task(name) for name in tasks), *SPEED, *MADE)
    return tuple(column for column in every if any(column.value(row) is not None for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; a failed candidate's row says why."""
    wanted = columns(rows)
    lines = ["| " + " | ".join(column.title for column in wanted) + " |", "|---|" + "---:|" * (len(wanted) - 1)]
    for row in rows:
        if "error" in row:
            why = row["error"].replace("|", "\\|")
            lines.append(f"| {row['candidate']} | {why} |" + " |" * (len(wanted) - 2))
        else:
            lines.append("| " + " | ".join(column.cell(row) for column in wanted) + " |")
    return "\n".join(lines)
