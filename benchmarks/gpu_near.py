"""The kernel that keeps up to 16 rows of x in registers: checked against float64, then its cuts timed beside bfloat16.

python benchmarks/gpu_near.py --seconds 70 --out FOLDER
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

from whit.kernels.gpu import kernel as gpu_kernel
from whit.kernels.gpu import near

from gpu_few import LIMIT, plain_seconds, scheme_of, wanted
from gpu_harness import Budget, Kitchen, random_packed, random_weights, random_x, relative_error, seconds_cold
from harness import machine

SHAPES = ((4096, 4096), (14336, 4096))
CHECKED = ((4072, 4096), (4072, 2304))
CUTS = ((16, 3), (16, 4), (16, 5))
WORK = "int4-g128:16,nf4:16,int4-g128:1,nf4:1,nf4-dq:1,int4-g128:8,nf4:8"
Work = tuple[str, int]


def configs(spec: str, rows: int) -> list[near.Config]:
    """Those that fit a multiprocessor."""
    every = (near.Config(*cut) for cut in CUTS)
    return [config for config in every if config.shared_bytes(scheme_of(spec), rows) <= near.LARGEST_SHARED]


def check(work: Sequence[Work], generator: torch.Generator) -> list[dict[str, Any]]:
    """Relative errors over formats and cuts, outs ragged, with as many rows as each is built for and with fewer."""
    found = []
    for (spec, rows), shape in itertools.product(work, CHECKED):
        packed, scheme = random_packed(spec, shape, generator), scheme_of(spec)
        for config, count in itertools.product(configs(spec, rows), sorted({rows, max(rows * 3 // 4, 1)})):
            x = random_x(count, shape[1], generator)
            ys = [gpu_kernel.multiply_near(x, packed, None, scheme, config) for _ in range(3)]
            error, same = relative_error(ys[0], wanted(x, packed)), all(torch.equal(y, ys[0]) for y in ys)
            entry = {"spec": spec, "rows": count, "shape": shape, "config": astuple(config)}
            found.append(entry | {"error": error, "same": same})
            if not error < LIMIT or not same:
                print("WRONG", found[-1], flush=True)
    good, most = sum(e["error"] < LIMIT and e["same"] for e in found), max(e["error"] for e in found)
    print(f"near: {good} of {len(found)} right, largest {most:.1e}", flush=True)
    return found


def timed(spec: str, shape: tuple[int, int], rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Seconds of each cut."""
    scheme, weights, x = scheme_of(spec), random_weights(spec, shape, generator), random_x(rows, shape[1], generator)

    def seconds(config: near.Config) -> float:
        return seconds_cold([lambda w=w: gpu_kernel.multiply_near(x, w, None, scheme, config) for w in weights], 5)

    ranking = sorted((seconds(config), astuple(config)) for config in configs(spec, rows))
    return {"spec": spec, "shape": shape, "rows": rows, "bytes": weights[0].nbytes, "ranking": ranking}


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
    every = {(scheme_of(spec), config, near.rounded(rows)) for spec, rows in work for config in configs(spec, rows)}
    kitchen.prepare((near.SOURCE, config.macros(scheme, False, rows).items()) for scheme, config, rows in every)
    print(f"compiled {len(kitchen.done)}, {budget.left:.0f} s left", flush=True)
    result: dict[str, Any] = {"machine": machine(), "check": check(work, generator)}
    plain = {
        (shape, rows): plain_seconds(shape, rows, generator)
        for shape, rows in itertools.product(SHAPES, sorted({rows for _, rows in work}))
    }
    result["plain"] = [(shape, rows, seconds) for (shape, rows), seconds in plain.items()]
    entries = result["timed"] = []
    for (spec, rows), shape in itertools.product(work, SHAPES):
        if budget.left < 2:
            print(f"no time left for {spec} {rows} {shape}")
            continue
        entries.append(found := timed(spec, shape, rows, generator))
        (best, config), bf16 = found["ranking"][0], plain[shape, rows]
        others = " ".join(f"{cut}:{seconds * 1e6:.1f}" for seconds, cut in found["ranking"][1:])
        times = f"bf16 {bf16 * 1e6:6.1f} near {bf16 / best:.2f}x {best * 1e6:6.1f} us"
        print(f"{spec:13} {shape!s:14} rows {rows} {times} {config} | {others}", flush=True)
        (given.out / "gpu_near.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
