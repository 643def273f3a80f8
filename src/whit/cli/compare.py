"""`whit compare`: candidates measured side by side, as a table, JSON, pictures and a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from whit.checkpoint.hub import at_revision
from whit.cli.console import on_screen, print_json, say
from whit.cli.options import (
    MODEL_HELP,
    AsJson,
    Device,
    Dtype,
    Limit,
    MaxTokens,
    Revision,
    ScoredText,
    TaskData,
    Tasks,
    TrustRemoteCode,
    parse_names,
)
from whit.cli.quiet import quiet_transformers
from whit.report.peers import PEERS

DEFAULT = "int8,nf4-dq,int4-g64,gptq:int4-g64,gptq:int3-g64-asym"
CANDIDATES_HELP = (
    "Separated by commas: FORMAT, METHOD:FORMAT, a recipe.toml, a checkpoint's folder or .gguf file, or a library: "
    + ", ".join(peer.name for peer in PEERS)
    + ". bf16, the original, always comes first."
)
SWEEP_HELP = "Also choose formats for sizes from LOW to HIGH bits per weight; each layer is measured once."


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="For the report, the rows and the models.")],
    candidates: Annotated[str, typer.Option(help=CANDIDATES_HELP)] = DEFAULT,
    sweep: Annotated[str | None, typer.Option(metavar="LOW:HIGH[:STEP]", help=SWEEP_HELP)] = None,
    sweep_method: Annotated[str, typer.Option(help="Method of the recipes of --sweep.")] = "gptq",
    text: ScoredText = "whit:heldout",
    context: Annotated[int | None, typer.Option(help="Tokens in a window. \\[default: 2048, or the model's]")] = None,
    max_tokens: MaxTokens = None,
    tasks: Tasks = "",
    task_data: TaskData = None,
    limit: Limit = None,
    calibration: Annotated[str, typer.Option(help="Text for methods that need data.")] = "whit:text",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    calibration_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each window of calibration.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose speed is measured.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written after it.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="How often speed is measured.")] = 3,
    speed_again: Annotated[bool, typer.Option("--speed-again", help="Measure speeds again.")] = False,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Measure only quality and size.")] = False,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Write no PNG files.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of quantization, calibration and bootstrap.")] = 0,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    from whit.calibration import Calibration
    from whit.evaluation import EvaluationOptions
    from whit.report.candidates import parse_entrants
    from whit.report.page import write_report
    from whit.report.runs import Settings
    from whit.report.runs import compare as measure
    from whit.report.speed import SpeedOptions

    model = at_revision(model, revision)
    quiet_transformers()
    if sweep is None and not candidates.strip(" ,"):
        raise typer.BadParameter("names none; give one, such as int4-g128, or --sweep", param_hint="--candidates")
    entrants = parse_entrants(candidates)
    evaluation = EvaluationOptions(
        text=text, context=context, max_tokens=max_tokens, task_data=task_data, limit=limit, device=device,
        dtype=dtype, tasks=parse_names(tasks),
        trust_remote_code=trust_remote_code, seed=seed,
    )  # fmt: skip
    settings = Settings(
        evaluation, None if no_speed else SpeedOptions(prompt_tokens, new_tokens, repeats),
        Calibration(calibration, samples, calibration_context, seed), seed, threads,
    )  # fmt: skip
    if sweep is not None:
        from whit.pipeline.job import Options
        from whit.report.sweep import Sweep
        from whit.report.sweep import sweep as budgets

        options = Options(seed=seed, device=device, trust_remote_code=trust_remote_code)
        files = budgets(model, out, Sweep.parse(sweep), sweep_method, settings.calibration, options, say)
        entrants = (*entrants, *parse_entrants(",".join(map(str, files)))[1:])
    found = measure(model, out, entrants, settings, say, speed_again)
    written = write_report(found, out, pictures=not no_pictures)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found.rows)
        for file in written:
            print(file)
    found.check()


def _show(rows: tuple[dict, ...]) -> None:  # type: ignore[type-arg]
    from whit.report.tables import columns, markdown

    if not sys.stdout.isatty():
        print(markdown(rows))
        return
    table = Table()
    wanted = columns(rows)
    for column in wanted:
        table.add_column(column.title, justify="left" if column.is_text else "right")
    for row in rows:
        table.add_row(*(column.cell(row) for column in wanted))
    on_screen().print(table)
