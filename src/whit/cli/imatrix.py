"""`whit imatrix`: what inputs a model's matrices see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whit.calibration import Calibration
from whit.checkpoint.hub import at_revision
from whit.cli.console import say
from whit.cli.options import MODEL_HELP, Device, Revision, Seed, TrustRemoteCode
from whit.pipeline.importance import check_new, measure_importance, write_imatrix


def imatrix(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file; .dat for llama.cpp's older format.")],
    calibration: Annotated[str, typer.Option(metavar="FILE|whit:text", help="A text or .jsonl file.")] = "whit:text",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each. \\[default: 2048, or the model's]")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    model = at_revision(model, revision)
    check_new(out)
    found = measure_importance(model, Calibration(calibration, samples, context, seed), device, trust_remote_code)
    write_imatrix(found, out)
    say(f"{out}: {len(found.sums)} matrices, {found.chunks} x {found.chunk_size} tokens")
