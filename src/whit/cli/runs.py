"""A run of the pipeline as a command shows it: what it is going to take, how far it is, what it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from whit.checkpoint.work import is_done
from whit.cli.console import console, on_screen, print_json, say
from whit.cli.shown import progress, reasons, show_totals
from whit.pipeline import run
from whit.pipeline.coverage import Account
from whit.pipeline.estimate import Estimate, estimate
from whit.pipeline.job import Job
from whit.pipeline.parameter import entry_of
from whit.spoken import duration, of_all_blocks, size, took


def run_account(job: Job) -> Account:
    """Run with progress; on standard error what a user should know of it."""
    notes = console()
    for note in job.notes:
        say(note, notes)
    for name, reason in job.source.dropped.items():
        say(f"dropped {name}: {reason}", notes)
    if not _is_done(job):
        say(cost(job, estimate(job)), notes)
    with progress(notes) as step:
        return run(replace(job, options=replace(job.options, progress=step)))


def run_and_show(job: Job, as_json: bool) -> Account:
    """Run with progress, then print the account."""
    done_before = _is_done(job)
    account = run_account(job)
    if as_json:
        print_json(account.to_json())
        return account
    screen = on_screen()
    show_totals(screen, account)
    spent = f"{took(account.seconds)}, peak memory {size(account.peak_memory_bytes)}"
    if account.decoded is not None:
        say(read_back(account.decoded), screen)
    say(f"{job.out}: {'was done already' if done_before else spent}", screen)
    return account


def _is_done(job: Job) -> bool:
    return is_done(job.out, job.fingerprint, job.options.restart)


def read_back(decoded: Mapping[str, Any]) -> str:
    """What a second decoder made of the file."""
    worst = decoded["largest_error"]
    said = "bit-exact" if worst == 0 else f"not exact, relative error up to {worst:.2g}"
    return f"read back by an independent decoder: {decoded['parameters']} parameters, {said}"


def show_plan(job: Job, as_json: bool, expected: Estimate | None = None) -> None:
    """The plan: formats, size, bits per weight, time, memory, disk as estimated, or as `expected`."""
    expected = expected or estimate(job)
    for note in job.notes:
        say(note)
    entries = [entry_of(item) for item in job.plan.items]
    if as_json:
        parameters = [
            {k: v for k, v in asdict(e).items() if k not in ("relative_error", "proxy_loss")} for e in entries
        ]
        totals = {"bits_per_weight": job.plan.bits_per_weight, "size_bytes": job.plan.size_bytes}
        print_json({**totals, "parameters": parameters, "estimate": asdict(expected)})
        return
    table = Table("modules", "count", "shape", "format", "bits")
    rows: dict[tuple[str, str, str], list[float]] = {}
    for item in job.plan.items:
        if item.target is not None:
            shape = " x ".join(map(str, item.target.shape))
            form = "kept" if item.format is None else str(item.format)
            rows.setdefault((of_all_blocks(item.target.holder), shape, form), []).append(item.bits_per_weight)
    for (name, shape, form), bits in rows.items():
        table.add_row(name, str(len(bits)), shape, form, f"{bits[0]:.3f}")
    screen = on_screen()
    screen.print(table)
    for line in reasons(entries):
        say(line, screen)
    say(cost(job, expected), screen)


def cost(job: Job, expected: Estimate) -> str:
    """What a run is going to take and give, in one line."""
    line = (
        f"{job.plan.bits_per_weight:.3f} bits per weight; {size(job.plan.size_bytes)} on disk; about "
        f"{duration(expected.seconds)} and {size(expected.memory_bytes)} of memory on {job.device}"
    )
    inputs, most = expected.inputs_bytes, job.options.input_memory
    if not inputs:
        return line
    where = "in memory" if inputs <= most else f"in files until the end, more than --input-memory {size(most)}"
    return f"{line}; {size(inputs)} of block inputs {where}"
