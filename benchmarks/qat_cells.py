"""One cell of the table of `qat.py`: a model quantized or trained in one way, and what is measured of it.

What was found is on the disk as soon as it is known: a model that was trained end to end is measured from its trained
values before it is written, and its cell is kept whatever happens after that.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qat_text
import whit
from qat_measures import equal, filled, load, measure, on_gpu
from whit.calibration import Calibration, CalibrationTokens
from whit.cli.runs import cost
from whit.errors import OutputError
from whit.evaluation.text import cut_windows
from whit.methods import GPTQ, RTN, Blocks, Refine
from whit.pipeline import run
from whit.pipeline.estimate import estimate
from whit.pipeline.job import prepare
from whit.process import peak_memory
from whit.qat import Course, Setting, Training, Words, finish, learn, prepare_full, prepare_scales
from whit.qat.recipes import efficientqat

from harness import machine

WAYS = ("rtn", "gptq", "refine", "blocks", "scales", "full")
# Full training by the kind of format: the rate of weights in steps of the format, and the steps. The wider the steps
# of the format, the further there is to go; ternary has all that is left, and the clock ends it.
FULL = {"int4": (0.004, 100), "int3": (0.006, 150), "int2": (0.01, 250), "binary": (0.015, 700)}
PILOTED = ("ternary", "binary")  # which take the rates that the pilot chose
SAVE_EVERY = 200.0  # seconds; the last step is saved anyhow
LONG_RATE, LONG_STEPS = 0.015, 5000


def cell_path(args: argparse.Namespace, format: str, way: str) -> Path:
    return Path(args.out / "cells" / f"{format}__{way}.json")


def model_path(args: argparse.Namespace, format: str, way: str) -> Path:
    return Path(args.out / "models" / f"{format}__{way}")


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, path)


class Cell:
    """One format in one way; `run` makes it and measures it."""

    def __init__(self, args: argparse.Namespace, format: str, way: str, baseline: Callable[[], Any]) -> None:
        self.args, self.format, self.way, self.baseline = args, format, way, baseline
        self.options = whit.Options(
            device="cuda" if on_gpu(args) else "cpu", progress=self._unit, input_memory=int(args.input_memory * 1e9)
        )
        self.rules = [("*", format)]
        text = qat_text.calibration_text(args.out / "tokens")
        self.calibration = Calibration(text, args.samples, args.context)
        self.out = model_path(args, format, way)
        self.record: dict[str, Any] = {"format": format, "way": way, "machine": machine(), "jobs": args.jobs}
        self.spent = args.out / "spent" / f"{format}__{way}.json"
        self.before = {"seconds": 0.0, "peak": 0}  # of calls that were ended before this one

    def run(self) -> dict[str, Any]:
        """The record, which is in its file as well."""
        self.began = time.monotonic()
        if self.spent.exists():
            self.before = json.loads(self.spent.read_text())
        if on_gpu(self.args):
            torch.cuda.reset_peak_memory_stats()
        if self.way == "bf16":
            self.record |= {"bits_per_weight": 16.0, "minutes": 0.0, "peak_memory_bytes": 0}
            self._keep(measure(self.args, self.baseline(), None))
            return self.record
        make: dict[str, Callable[[], None]] = {
            "scales": self._scales, "full": self._full, "efficientqat": self._efficientqat,
        }  # fmt: skip
        try:
            make.get(self.way, self._quantized)()
        except KeyboardInterrupt:
            self._say("interrupted")
            raise
        self._read_account()
        if "wikitext2" not in self.record:
            self.record |= measure(self.args, load(self.args, self.out), self.baseline())
        self._keep({})
        self.spent.unlink(missing_ok=True)
        return self.record

    def _quantized(self) -> None:
        if (self.out / "whit.json").exists():  # an earlier call was ended before it was measured
            return
        method: Any = {
            "rtn": RTN(), "gptq": GPTQ(), "refine": Refine(steps=self._steps(150), batch=4, checks=2),
            "blocks": Blocks(steps=self._steps(200), batch=4, checks=2),
        }[self.way]  # fmt: skip
        calibration = self.calibration if method.needs_stats else None
        recipe = whit.Recipe(method, self.rules)
        self._again(lambda o: whit.quantize(self.args.model, self.out, recipe, calibration=calibration, options=o))
        self._taken()

    def _scales(self) -> None:
        course = Course(
            steps=self._steps(80), batch=8, scale_rate=0.01, at_once=min(self.args.at_once, 8), seed=1
        )  # fmt: skip
        start = model_path(self.args, self.format, "blocks")
        words = Words(tokens=windows(self.args, course, 1024))
        self._train(
            lambda o: prepare_scales(start, self.out, course, words, Setting(o, teacher=self.args.model)), course
        )

    def _full(self) -> None:
        course = self._course()
        words = Words(tokens=windows(self.args, course, self.args.full_context))
        start = model_path(self.args, self.format, "blocks")
        given = start if (start / "whit.json").exists() else None
        self.record["start"] = "blocks" if given else "gptq"
        recipe = whit.Recipe(GPTQ(), self.rules)
        calibration = replace(self.calibration, samples=max(self.args.samples // 4, 1))

        def prepare(options: whit.Options) -> Training:
            setting = Setting(options, calibration=None if given else calibration, start=given)
            return prepare_full(self.args.model, self.out, recipe, course, words, setting)

        self._train(prepare, course)

    def _course(self) -> Course:
        """Of full training. What a first call has settled on is on the disk: a second one goes on with it."""
        path = self.args.out / "courses" / f"{self.format}.json"
        if path.exists() and (self.out.parent / f".{self.out.name}.training" / "state.safetensors").exists():
            return Course(**json.loads(path.read_text()))
        kind = self.format.partition("-")[0]
        rate, steps = FULL.get(kind, (LONG_RATE, LONG_STEPS))
        course = Course(
            steps=self._steps(steps), batch=self.args.full_batch, rate=self.args.full_rate * rate,
            scale_rate=self.args.full_scale_rate, kept_rate=self.args.full_kept_rate, at_once=self.args.at_once, seed=2,
        )  # fmt: skip
        if kind in PILOTED:
            course = replace(course, **chosen(self.args))
        if self.args.deadline:
            course = replace(course, seconds=max(self.args.deadline - time.time() - self.args.leave, 10.0))
        save(path, course.to_json())
        return course

    def _efficientqat(self) -> None:
        """As published: windows that do not overlap, both phases at the authors' rates."""
        phases = efficientqat(whit.parse_format(self.format), self.args.efficient_samples)
        first = model_path(self.args, self.format, "efficientqat-blocks")
        tokens = drawn(self.args, phases.calibration_samples, self.args.context, seed=0)
        text = CalibrationTokens(tokens, sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest())
        self._say(f"{len(tokens)} windows of {tokens.shape[1]} tokens")
        recipe = whit.Recipe(phases.blocks, self.rules)

        def blocks(options: whit.Options) -> None:
            one = replace(self.calibration, samples=1)  # takes no time; in its place come the windows
            job = replace(prepare(self.args.model, first, recipe, options, one, "whit"), calibration=text)
            if not first.exists():
                self._say(f"blocks: {cost(job, estimate(job))}")
            run(job)

        self._again(blocks)
        self.record["samples"] = len(tokens)
        self.record["blocks_minutes"] = json.loads((first / "whit.json").read_text())["seconds"] / 60
        course = replace(phases.scales, at_once=min(self.args.at_once, 4))
        words = Words(tokens=windows(self.args, course, 2 * self.args.context))
        self._say(f"scales: {course.steps} steps of {course.batch} windows of {2 * self.args.context} tokens")
        self._train(lambda o: prepare_scales(first, self.out, course, words, Setting(o)), course)

    def _train(self, prepare: Callable[[whit.Options], Training], course: Course) -> None:
        """Learn, measure what was learned, keep that, and only then write it and compare the two."""
        if (self.out / "whit.json").exists():
            return
        training = prepare(self.options)
        try:
            values = learn(training, self._seen, SAVE_EVERY)
        except OutputError:  # the state is of other options
            training = prepare(replace(self.options, restart=True))
            values = learn(training, self._seen, SAVE_EVERY)
        self._taken()
        self.record["training"] = dict(training.job.training)
        self.record["bits_per_weight"] = training.job.plan.bits_per_weight
        self.record |= measure(self.args, filled(self.args, training, values), self.baseline())
        self._keep({"written": False})
        finish(training, values)
        self._keep({"written": True, "packed_equals_trained": equal(self.out, training, values)})

    def _seen(self, what: str, step: int, total: int, loss: float) -> None:
        self.record |= {"steps": step, "loss": loss}
        self._say(f"{step}/{total} loss {loss:.4f}")

    def _unit(self, name: str, done: int, total: int) -> None:
        self._say(f"{done}/{total} {name}")

    def _say(self, what: str) -> None:
        """With the time, so that a stall is seen; what was spent is kept for the call that goes on from here."""
        print(f"{self.format} {self.way}: {what}, {self._minutes():.2f} min", flush=True)
        save(self.spent, {"seconds": 60 * self._minutes(), "peak": self._peak()})

    def _peak(self) -> int:
        """Most bytes that were held by any call: of the GPU's memory, or of the process."""
        return max(torch.cuda.max_memory_allocated() if on_gpu(self.args) else peak_memory(), int(self.before["peak"]))

    def _again(self, do: Callable[[whit.Options], object]) -> None:
        """Go on with what an earlier call began; begin anew where that had other options."""
        try:
            do(self.options)
        except OutputError:
            do(replace(self.options, restart=True))

    def _steps(self, count: int) -> int:
        return max(round(count * self.args.scale), 2)

    def _minutes(self) -> float:
        return (self.before["seconds"] + time.monotonic() - self.began) / 60

    def _taken(self) -> None:
        begun = cell_path(self.args, self.format, "blocks")
        if (self.way == "scales" or self.record.get("start") == "blocks") and begun.exists():
            before = float(json.loads(begun.read_text())["minutes"])
        else:
            before = 0.0
        self.record |= {
            "minutes": self._minutes() + before,
            "minutes_before": before,
            "peak_memory_bytes": self._peak(),
        }

    def _read_account(self) -> None:
        account = json.loads((self.out / "whit.json").read_text())
        self.record |= {key: account[key] for key in ("bits_per_weight", "size_bytes", "training")}
        self.record["recipe"] = account["recipe"]["method"]
        self.record.setdefault("minutes", account["seconds"] / 60)
        self.record.setdefault("peak_memory_bytes", account["peak_memory_bytes"])

    def _keep(self, more: Mapping[str, Any]) -> None:
        self.record |= more
        save(cell_path(self.args, self.format, self.way), self.record)


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """What the pilot found best for ternary and binary, where it has run."""
    path = args.out / "pilot.json"
    return dict(json.loads(path.read_text())["best"]) if path.exists() else {"text": args.full_text}


def windows(args: argparse.Namespace, course: Course, context: int) -> Tensor:
    """Windows of the training text, as many as the course takes or there are, in a seeded order."""
    return drawn(args, course.steps * course.batch, context, course.seed)


def drawn(args: argparse.Namespace, count: int, context: int, seed: int) -> Tensor:
    """That many windows of the training text, or all there are, in a seeded order; none overlaps another."""
    cut = cut_windows(qat_text.stream(args.out / "tokens", qat_text.TRAIN), context)[: -qat_text.HELD_OUT]
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))
    return cut[order[:count]]
