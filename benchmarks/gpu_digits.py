"""One row of 2 to 4 bits on Hopper with x in digits (digits.cu): checked against float64, then each cut timed beside
bfloat16 and the kernel that takes it otherwise; cold weights in CUDA graphs, medians.

python benchmarks/gpu_digits.py [--seconds 60] [--out FOLDER]
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
from whit.kernels import dequantize
from whit.kernels.gpu import digits, launches, tuned
from whit.kernels.gpu.digits import Config, Cut
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

from gpu_few import SHAPES, plain_seconds, scheme_of
from gpu_harness import Budget, Kitchen, copies, random_packed, random_x, relative_error, seconds_cold
from harness import RESULTS, machine, markdown

FORMATS = ("int2-g64", "int3-g128", "int4-g128")
# Outs of weights that share x, and columns: the four shapes, then q, k and v, and gate and up, of Llama-3-8B.
WORK = (*(((outs,), columns) for outs, columns in SHAPES), ((4096, 1024, 1024), 4096), ((14336, 14336), 4096))
CHECKED = (
    ("int2-g64", (4072, 33), 4096), ("int2-g128", (1000,), 4096), ("int2-g256", (1000,), 8192),
    ("int2-g64-f32", (999,), 4096), ("int2-g64", (4096,), 14336), ("int3-g128", (4072, 100, 1), 4096),
    ("int3-g128", (4096,), 14336), ("int4-g128", (4072,), 4096), ("int4-g64", (999, 40), 8192),
)  # fmt: skip
LIMIT = 2.5e-3
Work = tuple[str, tuple[int, ...], int]


def tiles_of(outs: Sequence[int]) -> int:
    return sum(-(-n // digits.OUTS) for n in outs)


def configs(spec: str, outs: Sequence[int], columns: int, multiprocessors: int) -> dict[Cut, Config]:
    """The configurations that fit, one for each cut they come to."""
    scheme, found = scheme_of(spec), {}
    for warps, each, stages, blocks in itertools.product((8, 7, 4), (1, 2), (3, 4, 6), (1, 2)):
        config = Config(warps, each, stages, blocks)
        if (cut := digits.fit(scheme, config, columns, tiles_of(outs), multiprocessors)) and cut.warps >= 4:
            found.setdefault(cut, config)
    return found


def weights(spec: str, outs: Sequence[int], columns: int, generator: torch.Generator) -> list[PackedWeight]:
    return [random_packed(spec, (n, columns), generator) for n in outs]


def multiply(x: torch.Tensor, packed: Sequence[PackedWeight], scheme: Scheme, cut: Cut) -> list[torch.Tensor]:
    return launches.by_digits(x, packed, [None] * len(packed), scheme, cut).start()


def check(work: Work, multiprocessors: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """Relative errors of every cut, three times each."""
    spec, outs, columns = work
    scheme, packed, x = scheme_of(spec), weights(*work, generator), random_x(1, columns, generator)
    x[0, 7] *= 300  # an outlier, by which the digits of its warp go
    wanted = torch.cat([x.double() @ dequantize(w, torch.float32).double().T for w in packed], 1)
    found = []
    for cut in configs(spec, outs, columns, multiprocessors):
        try:
            ys = [torch.cat(multiply(x, packed, scheme, cut), 1) for _ in range(3)]
        except KernelError as problem:
            print(f"FAIL {work} {cut}: {str(problem)[:200]}", flush=True)
            continue
        error, same = relative_error(ys[0], wanted), all(torch.equal(y, ys[0]) for y in ys)
        found.append({"work": work, "cut": astuple(cut), "error": error, "right": error < LIMIT and same})
        if not found[-1]["right"]:
            print("WRONG", found[-1], flush=True)
    return found


def timed(work: Work, multiprocessors: int, generator: torch.Generator) -> dict[str, Any]:
    """Seconds of bf16 (all outs at once), of the kernel for few rows and of each cut."""
    spec, outs, columns = work
    scheme, first, x = scheme_of(spec), weights(*work, generator), random_x(1, columns, generator)
    nbytes, shape = sum(w.nbytes for w in first), (sum(outs), columns)
    every = [first, *(weights(*work, generator) for _ in range(copies(nbytes) - 1))]
    few = tuned.best_few(scheme, shape, 1, (9, multiprocessors))
    assert few is not None
    none = [None] * len(outs)
    other = [lambda w=w: launches.by_few(x, w, none, scheme, few).start() for w in every]
    cell = {"work": work, "bytes": nbytes, "bf16": plain_seconds(shape, 1, generator), "few": seconds_cold(other, 5)}
    ranking = []
    for cut, config in configs(spec, outs, columns, multiprocessors).items():
        try:
            calls = [lambda w=w, c=cut: multiply(x, w, scheme, c) for w in every]
            ranking.append((seconds_cold(calls, 5), astuple(config)))
        except KernelError as problem:
            print(f"FAIL {work} {cut}: {str(problem)[:200]}", flush=True)
    cell["ranking"] = sorted(ranking)
    times = f"bf16 {cell['bf16'] * 1e6:.1f} few {cell['few'] * 1e6:.1f}"
    print(*work, times, [(f"{t * 1e6:.2f}", c) for t, c in cell["ranking"][:4]], flush=True)
    return cell


def table(cells: list[dict[str, Any]]) -> str:
    lines = []
    for cell in cells:
        (spec, outs, columns), (best, cut), plain = cell["work"], cell["ranking"][0], cell["bf16"]
        times = f"{plain * 1e6:.1f}", f"{plain / cell['few']:.2f}", f"{best * 1e6:.2f}", f"{plain / best:.2f}"
        what = f"{'+'.join(map(str, outs))}x{columns}"
        lines.append((spec, what, *times, f"{cell['bytes'] / best / 1e9:.0f}", ", ".join(map(str, cut))))
    header = ("format", "shape", "bf16, us", "few.cu, times bf16", "us", "times bf16", "GB/s", "cut")
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    kitchen, budget = Kitchen(), Budget(given.seconds)
    generator = torch.Generator("cuda").manual_seed(0)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    work = [(spec, outs, columns) for spec, (outs, columns) in itertools.product(FORMATS, WORK)]
    kitchen.prepare(
        (digits.SOURCE, digits.macros(scheme_of(spec), cut, False, len(outs)).items())
        for spec, outs, columns in (*work, *CHECKED)
        for cut in configs(spec, outs, columns, multiprocessors)
    )
    print(f"compiled {len(kitchen.done)}, {budget.left:.0f} s left", flush=True)
    checks = [each for one in CHECKED for each in check(one, multiprocessors, generator)]
    print(f"{sum(c['right'] for c in checks)} of {len(checks)} right, {budget.left:.0f} s left", flush=True)
    cells: list[dict[str, Any]] = []
    for one in work:
        if budget.left > 2:
            cells.append(timed(one, multiprocessors, generator))
    given.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "checks": checks, "cells": cells}
    (given.out / "gpu_digits.json").write_text(json.dumps(result, indent=1) + "\n")
    head = f"{machine().get('gpu')}. {sum(c['right'] for c in checks)} of {len(checks)} checks passed."
    (given.out / "gpu_digits.md").write_text(f"{head}\n\n{table(cells)}\n")
    print(table(cells))
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
