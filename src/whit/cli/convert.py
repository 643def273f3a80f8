"""`whit convert`: file to file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from whit.cli.quantize import FORMAT_HELP, RULE_HELP, build_recipe, run_and_show
from whit.job import Options, prepare


class Export(str, Enum):
    """What `whit convert` writes."""

    bf16 = "bf16"
    whit = "whit"


def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder or a hub id, quantized by whit or not.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder; it appears when it is complete.")],
    export: Annotated[Export, typer.Option(help="bf16: a plain transformers checkpoint; whit: packed, by rounding.")],
    format: Annotated[str | None, typer.Option(metavar="SPEC", help=FORMAT_HELP)] = None,
    rule: Annotated[list[str] | None, typer.Option(metavar="GLOB=SPEC", help=RULE_HELP)] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again, and replace an older result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Write a model in another form; what is not lossless says its relative error."""
    if export is Export.bf16 and (format is not None or rule):
        raise typer.BadParameter("bf16 has one format only; drop --format and --rule", param_hint="--export")
    if export is Export.whit and format is None:
        raise typer.BadParameter("whit needs a format; add for example --format int4-g128", param_hint="--export")
    options = Options(restart=restart, trust_remote_code=trust_remote_code)
    recipe = None if export is Export.bf16 else build_recipe(None, format, rule, None)
    account = run_and_show(prepare(model, out, recipe, options), as_json)
    worst = max((e.relative_error or 0.0 for e in account.parameters), default=0.0)
    if not as_json:
        said = "lossless" if worst == 0 else f"largest relative error of a parameter: {worst:.3g}"
        Console().print(said, highlight=False)
