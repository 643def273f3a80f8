"""What `whit train` does once its options are understood: one of three ways of training, shown as it goes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from whit.calibration import Calibration
from whit.checkpoint.hub import resolve_model
from whit.checkpoint.reader import read_config
from whit.cli.console import console, on_screen, print_json, say
from whit.cli.runs import cost, run_and_show, show_plan
from whit.cli.shown import progress, show_totals
from whit.errors import RecipeError
from whit.export.readers import quant_method
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
from whit.qat.sampled import own_calibration
from whit.recipe import Recipe
from whit.spoken import duration, size


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


def train_as_asked(model: str, out: Path, asked: Asked) -> None:
    """What is asked for, checked against the model, then planned or done, and shown."""
    options, quantized = asked.setting.options, is_quantized(model, asked.setting.options.trust_remote_code)
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
        say(f"the model first writes {text.count:,} tokens; about {duration(seconds)}")
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
        f"{course.steps} steps of {course.batch} windows, {tokens:,} tokens in all; about "
        f"{duration(expected.seconds)} and {size(expected.memory_bytes)} of memory on {training.job.device}"
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


def is_quantized(model: str, trust_remote_code: bool) -> bool:
    """Whether MODEL is quantized already; a .gguf file counts as such."""
    folder = resolve_model(model, trust_remote_code)
    return folder.is_file() or quant_method(read_config(folder)) is not None
