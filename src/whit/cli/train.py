"""`whit train`: quantization-aware training, of one block after the other or end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer

from whit.calibration import Calibration
from whit.checkpoint.hub import at_revision
from whit.cli.options import (
    FORMAT_HELP,
    OUT_HELP,
    RULE_HELP,
    AsJson,
    Device,
    Export,
    InputMemory,
    Restart,
    Revision,
    Seed,
    Threads,
    TrustRemoteCode,
    input_bytes,
    parse_rules,
)
from whit.cli.trained import Asked, is_quantized, train_as_asked
from whit.cli.unused import refuse_unused, typed
from whit.export import kind_of
from whit.formats import parse_format
from whit.methods import Blocks, parse_method
from whit.pipeline.job import Options
from whit.qat import OWN_TEXT, Course, Setting, Words
from whit.qat.recipes import BITNET_ACTIVATIONS, BITNET_FORMAT, NAMES, SAMPLES, efficientqat

T = TypeVar("T", Blocks, Course)

TEXT_HELP = "What to train on: a text or .jsonl file, whit:text, or self: text that the model itself writes."
QAT_HELP = (
    "full: the whole model, end to end, following the unquantized one; blocks: one block after the other; scales: only "
    "the scales and zero points of a quantized MODEL (an unquantized one is trained by blocks first). "
    "\\[default: full; scales if MODEL is quantized]"
)
ACTIVATIONS_HELP = (
    "Also quantize the inputs of linears, in training and in the result (full only): int8, int8-g32, fp8, or, with "
    "ranges that are learned, int8-static and int8-static-asym. --format w4a8-static names both."
)
RECIPE_HELP = f"Hyper-parameters by name, or BitNet's linears: {', '.join(NAMES)}."
KEPT_HELP = "Learning rate of norms, biases and embeddings; 0: they stay as they are. \\[default: 0]"
DISTILL_HELP = "Weight of the KL divergence from the teacher in the loss. \\[default: 1; efficientqat: 0]"
NEXT_HELP = "Weight of the text's own next tokens in the loss. \\[default: 0; efficientqat: 1]"
HIDDEN_HELP = "Weight of the distance from the teacher's hidden states in the loss. \\[default: 0]"
AT_ONCE_HELP = "Windows that run together on a GPU. \\[default: 4; efficientqat: 2]"


def train(
    asked_by: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id; for --qat scales a quantized one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=OUT_HELP)],
    format: Annotated[str | None, typer.Option(metavar="SPEC", help=FORMAT_HELP)] = None,
    rule: Annotated[list[str] | None, typer.Option(metavar="GLOB=SPEC", help=RULE_HELP)] = None,
    activations: Annotated[str | None, typer.Option(metavar="SPEC", help=ACTIVATIONS_HELP)] = None,
    qat: Annotated[Literal["full", "blocks", "scales"] | None, typer.Option(help=QAT_HELP)] = None,
    recipe: Annotated[Literal["whit", "efficientqat", "bitnet"], typer.Option(help=RECIPE_HELP)] = "whit",
    text: Annotated[str, typer.Option(metavar="FILE|whit:text|self", help=TEXT_HELP)] = "whit:text",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps (of each block). \\[default: 400]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows per step. \\[default: 16; blocks: 8]")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. \\[default: 512; blocks: 2048]")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows for --qat blocks. \\[default: 128]")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows for training end to end. \\[default: steps x batch]")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Learning rate of weights, in steps of the format.")] = None,
    scale_rate: Annotated[float | None, typer.Option(min=0, help="Learning rate of scales and zero points.")] = None,
    kept_rate: Annotated[float | None, typer.Option(min=0, help=KEPT_HELP)] = None,
    start: Annotated[str, typer.Option(metavar="METHOD|FOLDER", help="Where the first codes come from.")] = "gptq",
    teacher: Annotated[str | None, typer.Option(help="The unquantized model that --qat scales follows.")] = None,
    distill: Annotated[float | None, typer.Option(min=0, help=DISTILL_HELP)] = None,
    next_token: Annotated[float | None, typer.Option(min=0, help=NEXT_HELP)] = None,
    hidden: Annotated[float | None, typer.Option(min=0, help=HIDDEN_HELP)] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after this time; a second run will not give the same bytes.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help=AT_ONCE_HELP)] = None,
    input_memory: InputMemory = None,
    seed: Seed = 0,
    export: Export = None,
    device: Device = "auto",
    threads: Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, time and memory; read no weights.")] = False,
    restart: Restart = False,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    model = at_revision(model, revision)
    if threads is not None:
        torch.set_num_threads(threads)
    options = Options(seed, device, restart, trust_remote_code, input_memory=input_bytes(input_memory))
    given, quantized = typed(asked_by), is_quantized(model, trust_remote_code)
    mode = qat or ("scales" if quantized or recipe == "efficientqat" else "full")
    refuse_unused(asked_by, mode, quantized)
    if recipe == "efficientqat" and mode == "full":
        raise typer.BadParameter("its phases are blocks, then scales; use --qat scales", param_hint="--qat")
    if recipe == "bitnet":
        format, activations = format or BITNET_FORMAT, activations or BITNET_ACTIVATIONS
        start = start if "start" in given else "rtn"
    rules = [("*", format), *parse_rules(rule)] if format is not None else parse_rules(rule)
    blocks, course, usual = _published(recipe, format, samples, seed)
    both = {"steps": steps, "batch": batch, "rate": rate, "scale_rate": scale_rate}
    blocks = _changed(blocks, both)
    alone = {"kept_rate": kept_rate, "at_once": at_once, "distill": distill, "text": next_token, "hidden": hidden}
    course = _changed(course, both | alone | {"seconds": None if minutes is None else 60 * minutes})
    if "start" in given and mode != "full" and (start != "gptq" or recipe == "efficientqat"):
        blocks = replace(blocks, start=parse_method(start))
    folder = Path(start) if Path(start).is_dir() else None
    # What the model writes itself is not there yet; windows of this text are as many and as long.
    calibration = Calibration("whit:text" if text == OWN_TEXT else text, samples or usual, context, seed)
    asked = Asked(
        mode, rules, course, Words(text, windows or course.steps * course.batch, context),
        Setting(options, export or kind_of(out) or "whit", calibration, folder, teacher), blocks, calibration, start,
        activations, as_json, dry_run,
    )  # fmt: skip
    train_as_asked(model, out, asked)


def _published(recipe: str, format: str | None, samples: int | None, seed: int) -> tuple[Blocks, Course, int]:
    """Hyper-parameters by the name of a recipe, of blocks and end to end, and how many windows blocks take."""
    if recipe != "efficientqat":
        return Blocks(seed=seed), Course(seed=seed, fitted=recipe == "bitnet"), 128
    phases = efficientqat(parse_format(format or "int2-g64-asym"), samples or SAMPLES)
    return replace(phases.blocks, seed=seed), replace(phases.scales, seed=seed), phases.calibration_samples


def _changed(values: T, given: Mapping[str, float | int | None]) -> T:
    """Hyper-parameters with those that a command line names."""
    named: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return replace(values, **named)
