"""`whit merge`: an adapter into the model that it was trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from whit.checkpoint.hub import at_revision
from whit.cli.console import console, on_screen, print_json, say
from whit.cli.options import (
    CALIBRATION_HELP,
    FORMAT_HELP,
    OUT_HELP,
    SHIPPED,
    AsJson,
    Device,
    Export,
    Restart,
    Revision,
    Samples,
    Seed,
    TrustRemoteCode,
    build_calibration,
)
from whit.cli.quiet import quiet_transformers
from whit.cli.runs import run_account
from whit.cli.watching import Watching
from whit.data import resolve_text
from whit.evaluation.text import read_text
from whit.export import kind_of
from whit.merging import ROUTES, Measured, Merge, Text, measure_routes, prepare_merge
from whit.pipeline.coverage import Account
from whit.pipeline.job import Options

ROUTE_HELP = (
    "requantize: new codes in the model's own formats or in --format, chosen by the inputs that the linears see, with "
    "the old scales or better ones; sidecar: the codes stay, with the adapter beside them in bfloat16; bf16: no codes. "
    "\\[default: requantize, or bf16 where MODEL is not quantized]"
)
SOURCE_HELP = "The model in full precision, to merge into its weights instead of the quantized ones."


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What the adapter was trained on: a folder or hub id.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter's folder, as PEFT saves it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=OUT_HELP)],
    route: Annotated[str | None, typer.Option(metavar="|".join(ROUTES), help=ROUTE_HELP)] = None,
    format: Annotated[str | None, typer.Option(metavar="SPEC", help="Quantize again. " + FORMAT_HELP)] = None,
    source: Annotated[str | None, typer.Option(metavar="MODEL", help=SOURCE_HELP)] = None,
    calibration: Annotated[str | None, typer.Option(metavar="FILE|whit:text", help=CALIBRATION_HELP + SHIPPED)] = None,
    samples: Samples = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each. \\[default: 2048, or the model's]")
    ] = None,
    seed: Seed = 0,
    export: Export = None,
    text: Annotated[str, typer.Option(metavar="FILE", help="Text that the merge is measured on.")] = "whit:heldout",
    max_tokens: Annotated[int, typer.Option(min=2, help="Measure on the first N tokens of that text.")] = 16384,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure the result against base and adapter.")
    ] = True,
    device: Device = "auto",
    restart: Restart = False,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    model = at_revision(model, revision)
    if measured:
        read_text(resolve_text(text))  # what is wrong with it is said before the work
    seen = build_calibration(calibration, samples, context, seed)
    wanted = Merge(route, format, source, seen, export or kind_of(out) or "whit")
    options = Options(seed=seed, device=device, restart=restart, trust_remote_code=trust_remote_code)
    account = run_account(prepare_merge(model, adapter, out, wanted, options))
    found: tuple[Measured, ...] = ()
    if measured:
        quiet_transformers()
        with Watching(console()) as watching:
            done = route or "merged"
            found = measure_routes(model, adapter, {done: out}, Text(text, None, max_tokens), device, watching)
    if as_json:
        print_json({**account.to_json(), "measured": [asdict(each) for each in found]})
        return
    screen = on_screen()
    for line in said(account):
        say(line, screen)
    if found:
        screen.print(table(found, text))
    say(f"{out}: {account.bits_per_weight:.3f} bits per weight", screen)


def said(account: Account) -> list[str]:
    """How many parameters were merged without loss, and how much of the others' change their scales could take."""
    reasons = [entry.reason for entry in account.parameters if entry.reason and "of the change lies in" in entry.reason]
    if not reasons:
        return []
    free = [reason for reason in reasons if "lossless" in reason]
    shares = [float(reason.rpartition("; ")[2].partition(" %")[0]) for reason in reasons if reason not in free]
    lines = [f"{len(free)} of {len(reasons)} parameters merged without loss, into scales and zero points"]
    if shares:
        mean = sum(shares) / len(shares)
        lines.append(f"{len(shares)} have new codes: only {mean:.3g} % of their change lies in scales and zero points")
    return lines


def table(found: tuple[Measured, ...], text: str) -> Table:
    """The routes and their divergence from base and adapter."""
    made = Table("route", "KL", "likeliest token agrees", title=f"from base and adapter on {text}")
    for each in found:
        made.add_row(each.route, f"{each.kl:.6g}", f"{100 * each.agreement:.2f} %")
    return made
