"""`whit train`: quantization-aware training, of one block after the other or end to end."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from whit.calibration import Calibration
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.reader import read_json
from whit.cli.console import console, on_screen, print_json, say
from whit.cli.options import (
    EXPORT_HELP,
    FORMAT_HELP,
    RULE_HELP,
    AsJson,
    Device,
    InputMemory,
    Restart,
    Seed,
    Threads,
    TrustRemoteCode,
    input_bytes,
    parse_rules,
)
from whit.cli.runs import cost, run_and_show, show_plan
from whit.cli.shown import progress, show_totals, size
from whit.cli.unused import refuse_unused, typed
from whit.errors import RecipeError
from whit.export.readers import quant_method
from whit.formats import parse_format
from whit.methods import Blocks, parse_method
from whit.pipeline import run
from whit.pipeline.coverage import Account, load_account
from whit.pipeline.estimate import Estimate, estimate
from whit.pipeline.job import Job, Options, prepare
from whit.qat import OWN_TEXT, Course, Setting, Training, Words, prepare_full, prepare_scales
from whit.qat import train as train_whole
from whit.qat.expected import expect, writing_seconds
from whit.qat.job import plan_scales
from whit.qat.phases import both_done, place_of_blocks, prepare_second
from whit.qat.recipes import BITNET_ACTIVATIONS, BITNET_FORMAT, NAMES, efficientqat
from whit.qat.sampled import own_calibration
from whit.recipe import Recipe

TEXT_HELP = "What to train on: a text or .jsonl file, whit:text, or self: text that the model itself writes."
QAT_HELP = (
    "full: all of the model, end to end, following the unquantized one; blocks: one block after the other; scales: the "
    "params of a quantized MODEL alone (an unquantized one is trained by blocks first). \\[default: full; scales where "
    "MODEL is quantized]"
)
ACTIVATIONS_HELP = (
    "Round the inputs of linears too, in training as in the model (full only): int8, int8-g32, fp8, or, with ranges "
    "that are learned, int8-static and int8-static-asym. --format w4a8-static names both."
)
RECIPE_HELP = f"Hyper-parameters by name, or BitNet's linears: {', '.join(NAMES)}."


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, beside MODEL and OUT."""

    mode: str
    rules: list[tuple[str, str]]
    course: Course
    words: Words
    setting: Setting
    blocks: Blocks
    calibration: Calibration
    start: str
    activations: str | None
    as_json: bool
    dry_run: bool


def train(
    asked_by: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub id, quantized for scales.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder; it appears when it is complete.")],
    format: Annotated[str | None, typer.Option(metavar="SPEC", help=FORMAT_HELP)] = None,
    rule: Annotated[list[str] | None, typer.Option(metavar="GLOB=SPEC", help=RULE_HELP)] = None,
    activations: Annotated[str | None, typer.Option(metavar="SPEC", help=ACTIVATIONS_HELP)] = None,
    qat: Annotated[Literal["full", "blocks", "scales"] | None, typer.Option(help=QAT_HELP)] = None,
    recipe: Annotated[Literal["whit", "efficientqat", "bitnet"], typer.Option(help=RECIPE_HELP)] = "whit",
    text: Annotated[str, typer.Option(metavar="FILE|whit:text|self", help=TEXT_HELP)] = "whit:text",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps (of each block). \\[default: 400]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows a step. \\[default: 16; blocks: 8]")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens a window. \\[default: 512; blocks: 2048]")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of blocks. \\[default: 128]")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows end to end. \\[default: steps x batch]")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Of weights, in steps of the format.")] = None,
    scale_rate: Annotated[float | None, typer.Option(min=0, help="Of scales and zero points.")] = None,
    kept_rate: Annotated[float, typer.Option(min=0, help="Of norms, biases and embeddings; 0: they stay.")] = 0.0,
    start: Annotated[str, typer.Option(metavar="METHOD|FOLDER", help="Whose codes training begins with.")] = "gptq",
    teacher: Annotated[str | None, typer.Option(help="The unquantized model that scales follow.")] = None,
    distill: Annotated[float, typer.Option(min=0, help="Weight of KL from the teacher's logits.")] = 1.0,
    next_token: Annotated[float, typer.Option(min=0, help="Weight of the text's own next tokens.")] = 0.0,
    hidden: Annotated[float, typer.Option(min=0, help="Weight of the distance from its hidden states.")] = 0.0,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="End sooner; no second run gives the same bytes.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Windows that run together on a GPU.")] = 4,
    input_memory: InputMemory = None,
    seed: Seed = 0,
    export: Annotated[str, typer.Option(metavar="NAME", help=EXPORT_HELP)] = "whit",
    device: Device = "auto",
    threads: Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, time and memory; read no weights.")] = False,
    restart: Restart = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    options = Options(seed, device, restart, trust_remote_code, input_memory=input_bytes(input_memory))
    given, quantized = typed(asked_by), _is_quantized(model, trust_remote_code)
    mode = qat or ("scales" if quantized or recipe == "efficientqat" else "full")
    refuse_unused(asked_by, mode, quantized)
    if recipe == "efficientqat" and mode == "full":
        raise typer.BadParameter("its phases are blocks, then scales; use --qat scales", param_hint="--qat")
    if recipe == "bitnet":
        format, activations = format or BITNET_FORMAT, activations or BITNET_ACTIVATIONS
        start = start if "start" in given else "rtn"
    rules = [("*", format), *parse_rules(rule)] if format is not None else parse_rules(rule)
    blocks, course = Blocks(seed=seed), Course(seed=seed)
    if recipe == "efficientqat":
        phases = efficientqat(parse_format(format or "int2-g64-asym"), samples or 4096)
        blocks, course = replace(phases.blocks, seed=seed), replace(phases.scales, seed=seed)
        samples = samples or phases.calibration_samples
        distill = distill if "distill" in given else phases.scales.distill
        next_token = next_token if "next_token" in given else phases.scales.text
        at_once = at_once if "at_once" in given else phases.scales.at_once
    numbers = {"steps": steps, "batch": batch, "rate": rate, "scale_rate": scale_rate}
    changed = {key: value for key, value in numbers.items() if value is not None}
    blocks, course = replace(blocks, **changed), replace(course, **changed)  # type: ignore[arg-type]
    if "start" in given and mode != "full" and (start != "gptq" or recipe == "efficientqat"):
        blocks = replace(blocks, start=parse_method(start))
    course = replace(
        course, kept_rate=kept_rate, at_once=at_once, seconds=None if minutes is None else 60 * minutes,
        distill=distill, text=next_token, hidden=hidden, fitted=recipe == "bitnet",
    )  # fmt: skip
    folder = Path(start) if Path(start).is_dir() else None
    # What the model writes itself is not there yet; windows of this text are as many and as long.
    calibration = Calibration("whit:text" if text == OWN_TEXT else text, samples or 128, context, seed)
    asked = Asked(
        mode, rules, course, Words(text, windows or course.steps * course.batch, context),
        Setting(options, export, calibration, folder, teacher), blocks, calibration, start, activations, as_json,
        dry_run,
    )  # fmt: skip
    _do(model, out, asked)


def _do(model: str, out: Path, asked: Asked) -> None:
    options, quantized = asked.setting.options, _is_quantized(model, asked.setting.options.trust_remote_code)
    if not quantized and not asked.rules:
        raise RecipeError(f"{model}: not quantized; training needs the format it is for; add --format, say int2-g64")
    if quantized and (asked.rules or asked.mode != "scales"):
        raise RecipeError(f"{model}: quantized already; its own formats stay; drop --format, and use --qat scales")
    rules = Recipe("rtn", asked.rules).all_activations if asked.rules else ()
    how = asked.activations or next(iter(rules), None)
    if how is not None and asked.mode != "full":
        raise RecipeError(f"activations {how}: rounded in full training only; use --qat full, or drop it")
    if asked.mode == "full":
        method = "rtn" if asked.setting.start is not None else parse_method(asked.start)
        wanted = Recipe(method, asked.rules, activations=asked.activations)
        training = prepare_full(model, out, wanted, asked.course, asked.words, asked.setting)
        _whole(training, asked)
    elif quantized:
        _whole(prepare_scales(model, out, asked.course, asked.words, asked.setting), asked)
    else:
        _blocks_first(model, out, asked, options)


def _blocks_first(model: str, out: Path, asked: Asked, options: Options) -> None:
    """Block-wise training, and where scales are asked for too, their training end to end after it."""
    only = asked.mode == "blocks"
    recipe, place = Recipe(asked.blocks, asked.rules), out if only else place_of_blocks(out)
    job = prepare(model, place, recipe, options, asked.calibration, asked.setting.export if only else "whit")
    known, setting = job.fingerprint, replace(asked.setting, teacher=asked.setting.teacher or model)
    second = Training("scales", job, asked.course, asked.words, setting)
    if not only:
        second = plan_scales(job, asked.course, asked.words, setting)
    if asked.dry_run:
        show_plan(job, asked.as_json, _say_phases(job, second, only))
        return
    if not only and both_done(job, out, second):
        _show(load_account(out), out, asked.as_json)
        return
    fresh = options.restart or not job.out.exists()
    if fresh:
        _say_phases(job, second, only)
    if asked.words.text == OWN_TEXT and job.calibration is not None:
        job = replace(job, calibration=own_calibration(job))
    if only:
        run_and_show(job, asked.as_json)
        return
    with progress(console()) as step:
        run(replace(job, options=replace(options, progress=step)))
    _whole(prepare_second(job, known, out, asked.course, asked.words, setting), asked, said=fresh)
    shutil.rmtree(place)


def _say_phases(blocks: Job, second: Training, only: bool) -> Estimate:
    """What comes before and after block-wise training, in lines of their own; the estimate of all of it."""
    expected, text = estimate(blocks), blocks.calibration
    if second.words.text == OWN_TEXT and text is not None:
        seconds = writing_seconds(second, text.count)
        say(f"the model first writes {text.count:,} tokens; about {seconds:.0f} s")
        expected = replace(expected, seconds=expected.seconds + seconds)
    if only:
        return expected
    after = expect(second)
    say(f"blocks: {cost(blocks, expected)}")
    say(f"then {_steps(second, after)}")
    memory = max(expected.memory_bytes, after.memory_bytes)
    return replace(expected, seconds=expected.seconds + after.seconds, memory_bytes=memory)


def _steps(training: Training, expected: Estimate) -> str:
    """What a run is going to take, in one line."""
    course = training.course
    tokens = course.steps * course.batch * training.context
    return (
        f"{course.steps} steps of {course.batch} windows, {tokens:,} tokens in all; about {expected.seconds:.0f} s and "
        f"{size(expected.memory_bytes)} of memory on {training.job.device}"
    )


def _whole(training: Training, asked: Asked, said: bool = False) -> None:
    """End-to-end training with its cost first, where it was not `said`, and its progress."""
    notes, job = console(), training.job
    if asked.dry_run or not (said or (job.out.exists() and not job.options.restart)):
        expected = expect(training)
        say(_steps(training, expected))
        if asked.dry_run:
            show_plan(job, asked.as_json, expected)
            return
    with progress(notes) as bar:
        setting = replace(training.setting, options=replace(job.options, progress=bar))
        begin = None if training.begin is None else replace(training.begin, options=setting.options)
        account = train_whole(
            replace(training, begin=begin), lambda what, *step: bar(f"{what}, loss {step[2]:.4f}", *step[:2])
        )
    _show(account, job.out, asked.as_json)


def _show(account: Account, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(account.to_json())
        return
    screen = on_screen()
    show_totals(screen, account)
    say(f"{out}: peak memory {size(account.peak_memory_bytes)}", screen)


def _is_quantized(model: str, trust_remote_code: bool) -> bool:
    folder = resolve_model(model, trust_remote_code)
    return folder.is_file() or quant_method(read_json(folder / "config.json")) is not None
