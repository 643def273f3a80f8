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
import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import budget_cells as cells
from budget_bench import Bench
from budget_table import table, write_plot
from whit import Recipe
from whit.allocation import Group, solve
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
NO_SETTINGS = ("scratch", "stages", "limit_seconds", "targets", "mixes", "ranked", "table", "name", "jobs", "again")


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
