"""`whit memory`: what a model takes in each format, and what fits."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from whit.checkpoint.hub import at_revision
from whit.cli.console import on_screen, print_json, say
from whit.cli.options import AsJson, Revision, TrustRemoteCode, parse_rules
from whit.cli.shown import parse_size
from whit.devices import find_device
from whit.memory import Fit, Need, Planner, Situation, find_subject
from whit.spoken import size

CALIBRATED_BELOW = 5  # bits: from here on down calibration pays
DEFAULT_CONTEXT = 2048


class Train(str, Enum):
    """What `--train` takes."""

    full = "full"
    lora = "lora"
    qlora = "qlora"


class Device(str, Enum):
    """Where it would run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def memory(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|7B", help="Folder, .gguf file, hub id, a name such as Llama-3-8B, or a size."),
    ],
    format: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A format; may be repeated. \\[default: the usual ones]")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer. \\[default: 2048]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    cache_format: Annotated[
        str, typer.Option(metavar="SPEC", help="Format of keys and values: auto, fp16, int8 ...")
    ] = "auto",
    train: Annotated[Train | None, typer.Option(help="Plan training instead of generation.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter's factors.")] = 16,
    target: Annotated[str, typer.Option(help="Linears with adapters. \\[default: q_proj,k_proj,v_proj,o_proj]")] = "",
    rule: Annotated[list[str] | None, typer.Option(metavar="GLOB=SPEC", help="As in whit quantize.")] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Say what fits into this memory: 24GB, 16GiB ...")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Where the model will run; auto: a GPU if there is one.")
    ] = Device.auto,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    budget = None if fit is None else parse_size(fit)
    model = at_revision(model, revision)
    subject = find_subject(model, trust_remote_code)
    most = getattr(subject.config, "max_position_embeddings", None)
    where = "cuda" if device is Device.cuda else find_device(device.value).type  # it may be asked of another machine
    situation = Situation(
        context=context or min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT), batch=batch, cache_format=cache_format,
        device=where, train=None if train is None else train.value, rank=rank,
        targets=tuple(name for name in target.split(",") if name), rules=tuple(parse_rules(rule)),
    )  # fmt: skip
    planner = Planner(subject, situation)
    if most and situation.context > most:
        planner.notes.append(f"context {situation.context}: the model was built for {most}")
    rows = planner.rows(format or ())
    fits = [] if budget is None else planner.fits(budget, format or ())
    said = next_steps(model if subject.exists else "MODEL", fits, situation) if budget is not None else []
    notes = tuple(dict.fromkeys(planner.notes))  # rows and fits may say the same
    if as_json:
        print_json(_json(planner, rows, fits, said, notes))
        return
    screen = on_screen()
    show(screen, planner, rows)
    if budget is not None:
        show_fits(screen, fits, budget, situation)
    for line in (*(f"note: {note}" for note in notes), *said):
        say(line, screen)


def _json(
    planner: Planner, rows: list[Need], fits: list[Fit], said: list[str], notes: tuple[str, ...]
) -> dict[str, Any]:
    situation = planner.situation
    return {
        "model": planner.subject.name,
        "parameters": planner.subject.parameters,
        "context": situation.context,
        "batch": situation.batch,
        "device": situation.device,
        "train": situation.train,
        "textbook": planner.textbook(),
        "rows": [row.to_json() for row in rows],
        "fits": [found.to_json() for found in fits],
        "next": said,
        "notes": list(notes),
    }


def show(screen: Console, planner: Planner, rows: list[Need]) -> None:
    """The textbook line and the honest table."""
    subject, situation = planner.subject, planner.situation
    textbook = ", ".join(f"{row['format']} {size(row['weights_bytes'])}" for row in planner.textbook())
    say(
        f"{subject.name}: {subject.parameters:,} parameters. Textbook, {subject.nominal / 1e9:.3g}B x bits / 8, "
        f"weights alone: {textbook}",
        screen,
    )
    what = f"training ({situation.train})" if situation.train else "generation"
    unit, divisor = ("GB", 1e9) if max(row.total_bytes for row in rows) >= 1e9 else ("MB", 1e6)
    added = "optimizer" if situation.train else "cache"
    title = f"{what} on {situation.device}, context {situation.context}, batch {situation.batch}; {unit}"
    table = Table("format", title=title)
    for name in ("bits", "weights", added, "activations", "overhead", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        third = row.optimizer_bytes if situation.train else row.kv_cache_bytes
        cells = (row.weights_bytes, third, row.activations_bytes, row.overhead_bytes, row.total_bytes)
        name = row.format + (" checkpointing" if row.checkpointing else "")
        table.add_row(name, f"{row.bits_per_weight:.2f}", *(f"{cell / divisor:.2f}" for cell in cells))
    screen.print(table)
    if not situation.train and planner.layers:
        scoring = f"Scoring every position (whit evaluate) adds {size(planner.scoring_bytes())} of logits."
        say(scoring, screen)


def show_fits(screen: Console, fits: list[Fit], budget: int, situation: Situation) -> None:
    """What fits, best first."""
    if not fits:
        return
    table = Table("format", title=f"fits into {size(budget)}, batch {situation.batch}, best first")
    for name in ("bits", "total", "longest context"):
        table.add_column(name, justify="right")
    for found in fits:
        need, longest = found.need, f"{found.longest_context:,}"
        table.add_row(need.format, f"{need.bits_per_weight:.2f}", size(need.total_bytes), longest)
    screen.print(table)


def next_steps(model: str, fits: list[Fit], situation: Situation) -> list[str]:
    """What to type, or what to change where nothing fits."""
    if not fits:
        return [
            "Nothing fits: take a smaller model or context, --cache-format int8, or a lower format (--format int2-g32)."
        ]
    best = fits[0]
    name, spec = model, best.need.format
    lines = [f"best: {spec}, up to {best.longest_context:,} tokens of context"]
    if situation.train:
        return lines
    if spec in ("bf16", "fp16", "fp32", "as stored"):
        return [*lines, f"next: whit generate {name} --prompt TEXT"]
    bits = int(re.sub(r"\D", "", spec.partition("-")[0]) or 8)
    method = " --method gptq" if bits < CALIBRATED_BELOW else ""
    return [*lines, f"next: whit quantize {name} OUT{method} --format {spec}", "then: whit generate OUT --prompt TEXT"]
