"""Budgeted recipes against uniform ones and llama.cpp's mixes of the same size, by measured divergence.

    python benchmarks/budget.py MODEL TEXT [--calibration FILE] [--device cuda] [--jobs 12] [--limit-seconds 340]
        [--stages budget,rank] [--name budget_shipped]

At each of --targets whole-model bits per weight (every byte of the weight files): the recipe that a budget finds, and
the uniform ones that are at most as large (one format for every matrix, the embedding included, ggml's among them where
superblocks fit, and the same with an int8 embedding); the best of them counts. At the size of each of llama.cpp's mixes
(weighed by an importance matrix of the same calibration text, its tensors' bytes alone): the recipe that a budget of at
most as many bytes finds.
Stage `rank`: random recipes, a format drawn for every matrix; how well each kind of prediction ranks them.
Everything runs in --jobs processes; rows that an earlier run finished are kept; nothing new begins after the limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import budget_cells as cells
from budget_table import table, write_plot
from whit import Recipe
from whit.allocation import Group, free_formats, ladder_of, solve
from whit.allocation.recipe import recipe_of
from whit.errors import RecipeError
from whit.pipeline.job import Job
from whit.pipeline.plan import plan_quantization

import harness

GGML = ("q2_k", "q3_k", "iq4_xs", "q4_k", "iq4_nl", "q5_k")
UNIFORM = (*(f"int{bits}-g{size}-asym" for bits in (2, 3, 4, 5) for size in (128, 96, 64, 48, 32, 24, 16)), *GGML)
HEADS = {"": 4, "int8": 1}  # format of the embedding, where it is another, and how many below a target are measured
MIXES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k")
MEASURES = ("hessian", "probe", "kl")
RECIPES = 20
SLICES = 3  # of the matrices of a kind, each measured by a process of its own
NO_SETTINGS = ("scratch", "stages", "limit_seconds", "targets", "mixes", "ranked", "table", "name", "jobs", "again")


class Bench:
    """Rows by label, kept in a file; processes that make more of them until the time is up."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.end = time.monotonic() + args.limit_seconds
        self.setting = cells.Setting(
            args.model, args.text, args.calibration, args.samples, args.context, args.max_tokens, args.device,
            args.method, args.scratch,
        )  # fmt: skip
        self.path = harness.RESULTS / f"{args.name}.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.state: dict[str, Any] = {"rows": {}, "measured": {}, "parts": {}, **known}
        if args.again:
            others = {label: row for label, row in self.state["rows"].items() if row["kind"] in ("uniform", "mix")}
            self.state |= {"rows": others, "measured": {}, "parts": {}}
        self.pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
        self.ladder: list[str] | None = args.ladder
        self.ladder_is_checked = False
        self.lock = threading.Lock()  # rows come in on a thread of the pool
        Path(args.scratch).mkdir(parents=True, exist_ok=True)

    def row(self, label: str, work: Callable[..., dict[str, Any]], *arguments: Any, **more: Any) -> Future[Any] | None:
        """Begin a row unless it is there or the time is up."""
        if label in self.state["rows"] or time.monotonic() > self.end:
            return None
        future = self.pool.submit(work, self.setting, *arguments)
        future.add_done_callback(lambda done: self._keep(label, done, more))
        return future

    def _keep(self, label: str, done: Future[Any], more: dict[str, Any]) -> None:
        if done.cancelled():
            return
        if error := done.exception():
            print(f"{label}: failed: {type(error).__name__}: {error}", flush=True)
            return
        row = {**more, **done.result()}
        with self.lock:
            self.state["rows"][label] = row
        print(f"{label}: {row['bits_per_weight']:.3f} bits, KL {row['kl']:.4f}, {row['seconds']} s", flush=True)
        self.save()

    def wait(self, futures: list[Future[Any] | None]) -> None:
        """Until they are done or the time is up; what has not begun then is dropped."""
        wait([f for f in futures if f is not None], timeout=max(self.end - time.monotonic(), 0))
        for future in futures:
            if future is not None:
                future.cancel()

    def save(self) -> None:
        """The state so far."""
        harness.RESULTS.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with self.lock:
            partial.write_text(json.dumps(self.state, indent=1) + "\n")
            partial.replace(self.path)

    def check(self, job: Job, names: list[str]) -> None:
        """Leave out formats with which the method does not work on this device, and say so."""
        ladder = list(self.ladder or ladder_of(job))
        if self.setting.device == "cpu" or self.ladder_is_checked or all(n in self.state["measured"] for n in names):
            return
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:  # one may break a device's context
            wrong = apart.submit(cells.check, self.setting, ladder).result()
        for format, why in wrong.items():
            print(f"{format}: left out: {why}", flush=True)
        self.ladder, self.ladder_is_checked = [format for format in ladder if format not in wrong], True

    def start_measures(self, job: Job, names: list[str]) -> list[Future[Any] | None]:
        """Parts of a model's matrices, together all of them. Those of a part are alike, so that what is recorded for
        one serves the next."""
        ladder = list(self.ladder or ladder_of(job))
        kinds: dict[str, list[str]] = {}
        wanted = {n: [str(f) for f in formats] for n, formats in free_formats(job, ladder).items()}
        for name in wanted:
            kinds.setdefault(re.sub(r"[0-9]+", "*", name), []).append(name)
        parts = [part for kind in kinds.values() for i in range(SLICES) if (part := kind[i::SLICES])]
        parts.sort(key=lambda part: -len(part) * len(wanted[part[0]]))
        begun = []
        for how in (how for how in names if how not in self.state["measured"]):
            for part in parts:
                key = f"{how} {part[0]}"
                if key not in self.state["parts"] and time.monotonic() < self.end:
                    begun.append(
                        self.pool.submit(cells.measure, self.setting, how, {n: wanted[n] for n in part}, ladder)
                    )
                    begun[-1].add_done_callback(partial(self._keep_part, key))
        return begun

    def _keep_part(self, key: str, done: Future[Any]) -> None:
        if done.cancelled():
            return
        if error := done.exception():
            print(f"{key}: failed: {type(error).__name__}: {error}", flush=True)
            return
        with self.lock:
            self.state["parts"][key] = done.result()
        print(f"{key} ...: measured, {done.result()['seconds']:.0f} s", flush=True)
        self.save()

    def end_measures(self, job: Job, names: list[str], begun: list[Future[Any] | None]) -> bool:
        """Put the parts together; False where the time was up before the last."""
        self.wait(begun)
        items = [item.name for item in job.plan.items]
        count = len(free_formats(job, self.ladder or ladder_of(job)))
        for how in (how for how in names if how not in self.state["measured"]):
            with self.lock:
                parts = [part for key, part in self.state["parts"].items() if key.startswith(f"{how} ")]
            errors = {name: found for part in parts for name, found in part["errors"].items()}
            owners = {name: Group.named(name, {}).parameters for name in errors}
            if len({parameter for several in owners.values() for parameter in several}) < count:
                print(f"{how}: {len(errors)} groups are measured, not all; run it again", flush=True)
                return False
            seconds = sum(part["seconds"] for part in parts)
            ordered = dict(sorted(errors.items(), key=lambda entry: items.index(owners[entry[0]][0])))
            with self.lock:
                self.state["measured"][how] = {"errors": ordered, "process_seconds": round(seconds, 1)}
                self.state["parts"] = {k: v for k, v in self.state["parts"].items() if not k.startswith(f"{how} ")}
            print(f"{how}: {len(errors)} groups, {seconds:.0f} s of all processes", flush=True)
        self.save()
        return True

    def groups(self, how: str) -> tuple[Group, ...]:
        return cells.groups_of(self.state["measured"][how]["errors"])


def budget_stage(bench: Bench, job: Job, args: argparse.Namespace) -> None:
    """Targets, uniform recipes and mixes. What the rest waits for is begun first."""
    new = [name for name in args.mixes if f"mix-{name}" not in bench.state["rows"]]
    imatrix = bench.pool.submit(cells.importance, bench.setting) if new else None
    bench.check(job, [args.sensitivity])
    begun = bench.start_measures(job, [args.sensitivity])
    futures = [
        bench.row(label, cells.make, label, recipe.to_dict(), kind="uniform")
        for label, recipe in uniform_recipes(job, args.targets)
    ]
    try:
        mixes = [bench.row(f"mix-{name}", cells.mix, name, imatrix.result(), kind="mix") for name in new if imatrix]
    except Exception as error:
        print(f"importance matrix: {type(error).__name__}: {error}; no mixes", flush=True)
        mixes = []
    complete = bench.end_measures(job, [args.sensitivity], begun)
    groups = bench.groups(args.sensitivity) if complete else ()
    if complete:
        sizes = {f"budget-{bits:g}": int(bits * job.plan.parameters / 8) for bits in args.targets}
        futures += [budget_row(bench, job, groups, label, size) for label, size in sizes.items()]
    bench.wait(mixes)
    for name in args.mixes if complete else ():
        if size := bench.state["rows"].get(f"mix-{name}", {}).get("weights_bytes"):
            futures.append(budget_row(bench, job, groups, f"budget-as-{name}", size))
    bench.wait(futures)


def budget_row(bench: Bench, job: Job, groups: tuple[Group, ...], label: str, size: int) -> Future[Any] | None:
    """The recipe of at most `size` bytes, made and scored."""
    try:
        found = solve(job, groups, size)
    except RecipeError as error:
        print(f"{label}: {error}", flush=True)
        return None
    more = {"kind": "budget", "asked_bytes": size, "predicted": found.error, "recipe": found.recipe.to_toml()}
    return bench.row(label, cells.make, label, found.recipe.to_dict(), **more)


def uniform_recipes(job: Job, targets: list[float]) -> list[tuple[str, Recipe]]:
    """For every target the largest uniform recipes below it."""
    tables = [i.target.holder for i in job.plan.items if i.target is not None and i.target.kept_by_default]
    sized = []
    for form in UNIFORM:
        for head in HEADS:
            recipe = Recipe("rtn", [("*", form), *((name, head or form) for name in tables)])  # cells know the method
            try:
                plan = plan_quantization(job.source, recipe, job.exporter)
            except RecipeError:  # rows that its groups do not divide
                continue
            sized.append((plan.bits_per_weight, head, f"uniform-{form}" + (f"+{head}" if head else ""), recipe))
    sized.sort(key=lambda entry: -entry[0])
    chosen = {}
    for bits in targets:
        for head, count in HEADS.items():
            chosen |= {label: recipe for _, _, label, recipe in _largest(sized, head, bits)[:count]}
    return list(chosen.items())


def _largest(
    sized: list[tuple[float, str, str, Recipe]], head: str, bits: float
) -> list[tuple[float, str, str, Recipe]]:
    """Those with this head that are at most as large, the largest first."""
    return [entry for entry in sized if entry[0] <= bits and entry[1] == head]


def rank_stage(bench: Bench, job: Job, args: argparse.Namespace) -> None:
    """Random recipes, and what each measure says of them."""
    bench.check(job, args.ranked)
    if not bench.end_measures(job, args.ranked, bench.start_measures(job, args.ranked)):
        return
    draw = random.Random(0)
    groups = {how: bench.groups(how) for how in args.ranked}
    ladder = groups[args.ranked[0]]
    futures = []
    for number in range(RECIPES):
        formats = {p: draw.choice(list(g.errors)) for g in ladder for p in g.parameters}
        predicted = {}
        for how in args.ranked:
            predicted[how] = sum(g.errors[formats[g.parameters[0]]] for g in groups[how])
        recipe = recipe_of(job, formats)
        label = f"random-{number}"
        futures.append(bench.row(label, cells.make, label, recipe.to_dict(), kind="random", predicted=predicted))
    bench.wait(futures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", default="whit:text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--method", default="gptq", help="of all rows but the mixes; gptq+ refines scales and codes")
    parser.add_argument("--sensitivity", default="probe", choices=MEASURES)
    parser.add_argument("--ladder", type=lambda s: s.split(","), help="formats to choose from; whit's own unless given")
    parser.add_argument("--stages", default="budget,rank")
    parser.add_argument("--targets", type=lambda s: [float(x) for x in s.split(",")], default="2.5,3,3.5,4,4.5,5")
    parser.add_argument("--mixes", type=lambda s: [x for x in s.split(",") if x], default=",".join(MIXES))
    parser.add_argument("--ranked", type=lambda s: s.split(","), default=",".join(MEASURES), help="in stage rank")
    parser.add_argument("--limit-seconds", type=float, default=1e9)
    parser.add_argument("--name", default="budget")
    parser.add_argument("--scratch", default="/tmp/whit-budget")
    parser.add_argument("--again", action="store_true", help="keep no measured harm and no budget of earlier runs")
    parser.add_argument("--table", action="store_true", help="only write table and picture anew")
    args = parser.parse_args()
    if args.table:
        return show(args.name, json.loads((harness.RESULTS / f"{args.name}.json").read_text()))
    bench = Bench(args)
    job = cells.undecided(bench.setting)
    try:
        for stage in args.stages.split(","):
            {"budget": budget_stage, "rank": rank_stage}[stage](bench, job, args)
    finally:
        bench.pool.shutdown(wait=True, cancel_futures=True)
    settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}
    settings |= {key: Path(settings[key]).name for key in ("model", "text", "calibration")}
    bench.state |= {"machine": harness.machine(), "settings": settings}
    show(args.name, bench.state)


def show(name: str, state: dict[str, Any]) -> None:
    """JSON, tables and picture."""
    harness.save(name, state, table(state))
    write_plot(state, harness.RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
