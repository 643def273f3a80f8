"""`whit convert`: file to file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whit.checkpoint.hub import at_revision
from whit.cli.console import on_screen, say
from whit.cli.options import (
    EXPORT_HELP,
    FORMAT_HELP,
    MODEL_HELP,
    OUT_HELP,
    RULE_HELP,
    AsJson,
    Restart,
    Revision,
    TrustRemoteCode,
)
from whit.cli.quantize import build_recipe
from whit.cli.runs import run_and_show
from whit.export import exporter_named, kind_of
from whit.export.dense import Dense
from whit.pipeline.job import Options, prepare
from whit.pipeline.transcode import prepare_transcode


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Quantized or not.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=OUT_HELP)],
    export: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{EXPORT_HELP} Needed unless OUT ends in .gguf.")
    ] = None,
    format: Annotated[str | None, typer.Option(metavar="SPEC", help=FORMAT_HELP)] = None,
    rule: Annotated[list[str] | None, typer.Option(metavar="GLOB=SPEC", help=RULE_HELP)] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what cannot be copied exactly, and say the error.")
    ] = False,
    restart: Restart = False,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    model = at_revision(model, revision)
    options = Options(restart=restart, trust_remote_code=trust_remote_code)
    export = export or kind_of(out)
    if export is None:
        raise typer.BadParameter("name the kind of file, such as bf16, gguf or gptq", param_hint="--export")
    if issubclass(exporter_named(export), Dense):
        if format is not None or rule:
            raise typer.BadParameter(f"{export} has one format only; drop --format and --rule", param_hint="--export")
        job = prepare(model, out, None, options, export=export)
    else:
        if rule and format is None:
            raise typer.BadParameter("needs --format too, for all other modules", param_hint="--rule")
        recipe = None if format is None else build_recipe(None, format, rule, None)
        job = prepare_transcode(model, out, export, options, recipe, requantize)
    account = run_and_show(job, as_json)
    worst = max((e.relative_error or 0.0 for e in account.parameters), default=0.0)
    if not as_json:
        said = "lossless, bit-exact" if worst == 0 else f"largest relative error of a parameter: {worst:.3g}"
        say(said, on_screen())
