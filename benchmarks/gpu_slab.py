"""The kernel for up to 16 rows whose blocks lie beside each other: checked against float64, then its cuts timed.

python benchmarks/gpu_slab.py --seconds 70 --out FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from whit.errors import KernelError
from whit.kernels.gpu import kernel as gpu_kernel
from whit.kernels.gpu import slab

from gpu_few import LIMIT, plain_seconds, scheme_of, wanted
from gpu_harness import Budget, Kitchen, random_packed, random_weights, random_x, relative_error, seconds_cold
from harness import machine

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
CHECKED = ((4072, 4096), (520, 14336))
SPLITS = {4096: (1, 2, 4), 8192: (1, 2), 14336: (2, 4, 7)}  # by columns
INTEGERS = (  # outs, across, along, stages, blocks
    (128, 4, 2, 1, 2), (128, 2, 2, 1, 4), (256, 2, 4, 1, 2), (64, 4, 1, 1, 3), (64, 2, 1, 2, 3), (64, 2, 2, 2, 3),
    (128, 2, 2, 2, 2), (64, 2, 1, 1, 6), (64, 1, 1, 2, 6), (128, 1, 2, 1, 8), (32, 4, 1, 1, 4), (64, 4, 1, 2, 1),
    (32, 8, 1, 1, 2), (64, 8, 1, 1, 1), (128, 1, 2, 2, 4), (64, 3, 1, 1, 4), (128, 3, 2, 1, 2),
)  # fmt: skip
TABLES = (
    (128, 2, 2, 1, 2), (256, 1, 4, 1, 2), (128, 1, 2, 3, 2), (128, 2, 4, 1, 2), (64, 4, 2, 1, 2), (64, 4, 1, 1, 2),
    (64, 2, 2, 2, 2), (64, 2, 1, 1, 3), (64, 2, 2, 1, 3), (128, 1, 2, 1, 3), (64, 2, 2, 4, 1), (128, 4, 2, 1, 1),
    (128, 2, 2, 3, 1), (64, 8, 1, 1, 1), (64, 8, 2, 1, 1), (32, 8, 1, 1, 2), (32, 8, 1, 1, 1),
)  # fmt: skip
WORK = "int4-g128:16,nf4:16,int4-g128:8,nf4:8,int4-g128:1,nf4:1,nf4-dq:16,nf4-dq:1"
Work = tuple[str, int]


def configs(spec: str, rows: int, columns: int) -> list[slab.Config]:
    """Those that fit a multiprocessor, none with more room than columns to fill it."""
    scheme, bases = scheme_of(spec), TABLES if scheme_of(spec).storage.levels else INTEGERS
    found = []
    for (outs, across, along, stages, blocks), splits in itertools.product(bases, SPLITS[columns]):
        config = slab.Config(outs, across, along, stages, splits, blocks)
        if config.fits(scheme, rows) and across * stages * splits * slab.SPAN <= columns:
            found.append(config)
    return found


def check(work: Sequence[Work], generator: torch.Generator) -> dict[tuple[Any, ...], bool]:
    """Which cuts are right, outs ragged, with as many rows as each is built for and with fewer."""
    right: dict[tuple[Any, ...], bool] = {}
    for (spec, rows), shape in itertools.product(work, CHECKED):
        packed, scheme = random_packed(spec, shape, generator), scheme_of(spec)
        inputs = [random_x(count, shape[1], generator) for count in sorted({rows, max(rows * 3 // 4, 1)})]
        expected = [wanted(x, packed) for x in inputs]
        for config in configs(spec, rows, shape[1]):
            print("trying", spec, rows, shape, astuple(config), end=" ", flush=True)
            try:
                for x, y in zip(inputs, expected, strict=True):
                    ys = [gpu_kernel.multiply_slab(x, packed, None, scheme, config) for _ in range(3)]
                    error, same = relative_error(ys[0], y), all(torch.equal(each, ys[0]) for each in ys)
                    good = error < LIMIT and same
                    right[spec, rows, config] = right.get((spec, rows, config), True) and good
                    print(f"{error:.1e}" if good else f"WRONG {error:.1e} {same}", end=" ", flush=True)
            except KernelError as problem:
                right[spec, rows, config] = False
                print("FAIL", str(problem)[:150], end="")
            print(flush=True)
    print(f"slab: {sum(right.values())} of {len(right)} cuts right", flush=True)
    return right


def timed(
    spec: str, shape: tuple[int, int], rows: int, right: dict[tuple[Any, ...], bool], generator: torch.Generator
) -> dict[str, Any]:
    """Seconds of torch's bf16 product, of what is dispatched today and of each cut."""
    scheme, x = scheme_of(spec), random_x(rows, shape[1], generator)
    plain, weights = plain_seconds(shape, rows, generator), random_weights(spec, shape, generator)

    def seconds(config: slab.Config) -> float:
        return seconds_cold([lambda w=w: gpu_kernel.multiply_slab(x, w, None, scheme, config) for w in weights], 5)

    today = seconds_cold([lambda w=w: gpu_kernel.product(x, w, None) for w in weights], 5)
    usable = [config for config in configs(spec, rows, shape[1]) if right.get((spec, rows, config), True)]
    ranking = sorted((seconds(config), astuple(config)) for config in usable)
    found = {"spec": spec, "shape": shape, "rows": rows, "bytes": weights[0].nbytes, "plain": plain, "today": today}
    return found | {"ranking": ranking}


def show(found: dict[str, Any]) -> None:
    """A line."""
    (best, config), plain, today = found["ranking"][0], found["plain"], found["today"]
    others = " ".join(f"{cut}:{seconds * 1e6:.1f}" for seconds, cut in found["ranking"][1:])
    times = f"bf16 {plain * 1e6:6.1f} today {plain / today:.2f}x slab {plain / best:.2f}x {best * 1e6:6.1f} us"
    speed = found["bytes"] / best / 1e9
    what = f"{found['spec']:10} {found['shape']!s:14} rows {found['rows']}"
    print(f"{what} {times} {speed:5.0f} GB/s {config} | {others}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--work", default=WORK, help="FORMAT:ROWS,...")
    given = parser.parse_args()
    work = [(spec, int(rows)) for spec, rows in (each.split(":") for each in given.work.split(","))]
    kitchen, budget = Kitchen(), Budget(given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)
    every = {
        (scheme_of(spec), config, slab.rounded(rows))
        for (spec, rows), columns in itertools.product(work, SPLITS)
        for config in configs(spec, rows, columns)
    }
    kitchen.prepare((slab.SOURCE, config.macros(scheme, False, rows).items()) for scheme, config, rows in every)
    print(f"compiled {len(kitchen.done)}, {budget.left:.0f} s left", flush=True)
    right = check(work, generator)
    result: dict[str, Any] = {"machine": machine(), "check": [(*key, good) for key, good in right.items()]}
    entries = result["timed"] = []
    for (spec, rows), shape in itertools.product(work, SHAPES):
        if budget.left < 2:
            print(f"no time left for {spec} {rows} {shape}")
            continue
        entries.append(timed(spec, shape, rows, right, generator))
        show(entries[-1])
        (given.out / "gpu_slab.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
