"""Ternary weights on Hopper, one row and four: python benchmarks/ternary_gpu.py [--seconds 110] [--out FOLDER]

Products against float64 first, then each cut beside torch's bf16 product and the kernel for all other runs: cold
weights in CUDA graphs, medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from runs_gpu import on_cpu, random_packed, scheme_of
from whit.errors import KernelError
from whit.kernels import reference
from whit.kernels.gpu import runs, ternary
from whit.kernels.gpu.ternary import Config
from whit.tensor import PackedWeight

from gpu_few import SHAPES, plain_seconds
from gpu_harness import Budget, copies, random_x, relative_error, seconds_cold
from harness import RESULTS, machine, markdown

CHECKED = (
    ("ternary-g64", 1, (1000, 4096)), ("ternary-g64", 1, (1000, 8192)), ("ternary-g64", 4, (999, 1280)),
    ("ternary-g128", 3, (77, 640)), ("ternary", 2, (160, 4096)), ("ternary-tensor-absmean", 1, (333, 1024)),
    ("ternary-g64", 1, (4099, 14336)), ("ternary-g64-f32", 1, (160, 4096)),
)  # fmt: skip
SOME = (Config(4, 2), Config(7, 2, 1, 2), Config(15, 2), Config(13, 2, 1, 2))
LIMIT = 2.5e-3


def check(generator: torch.Generator) -> list[tuple[str, float, bool]]:
    """What was multiplied, the relative error, and whether it comes out the same again."""
    found = []
    for spec, rows, shape in CHECKED:
        packed, x = random_packed(spec, shape, generator), random_x(rows, shape[1], generator)
        bias = random_x(1, shape[0], generator)[0]
        wanted = x.double() @ reference.dequantize(on_cpu(packed), torch.float32).cuda().double().T + bias.double()
        for cut in {ternary.best(packed, rows), *SOME} - {None}:
            if ternary.shared_bytes(packed, cut, rows) > ternary.MOST_SHARED:
                continue
            first, again = (ternary.multiply(x, packed, bias, cut) for _ in range(2))
            found.append((f"{spec} {shape} {rows} {cut}", relative_error(first, wanted), torch.equal(first, again)))
    return found


def cuts(packed: PackedWeight, rows: int) -> list[Config]:
    """Those that have room."""
    count = ternary.steps(packed.shape[1])
    warps = {-(-count // each) for each in (1, 2, 3, 4)} & set(range(5, 17))
    every = [Config(*cut) for cut in itertools.product(sorted(warps), (2, 3), (1, 2), (1, 2))]
    return [c for c in every if ternary.shared_bytes(packed, c, rows) * c.min_blocks <= ternary.MOST_SHARED]


def timed(shape: tuple[int, int], rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Seconds of bf16, of the other kernel, and of each cut."""
    first, x = random_packed("ternary-g64", shape, generator), random_x(rows, shape[1], generator)
    weights = [first, *(random_packed("ternary-g64", shape, generator) for _ in range(copies(first.nbytes) - 1))]
    ranking = []
    for cut in cuts(first, rows):
        try:
            calls = [lambda w=w, c=cut: ternary.multiply(x, w, None, c) for w in weights]
            ranking.append((seconds_cold(calls, 5), astuple(cut)))
        except KernelError as problem:
            print(f"FAIL {shape} {rows} {cut}: {str(problem)[:200]}", flush=True)
    other = [lambda w=w: runs.multiply_few(x, w, None, scheme_of(w), runs.best(shape, rows)) for w in weights]
    plain = plain_seconds(shape, rows, generator)
    cell = {"shape": shape, "rows": rows, "bytes": first.nbytes, "bf16": plain, "other": seconds_cold(other, 5)}
    print(shape, rows, f"bf16 {plain * 1e6:.1f}", sorted(ranking)[:3], flush=True)
    return cell | {"ranking": sorted(ranking)}


def table(cells: list[dict[str, Any]]) -> str:
    lines = []
    for cell in cells:
        if cell["ranking"]:
            best, cut = cell["ranking"][0]
            plain, speed = cell["bf16"], cell["bytes"] / best / 1e9
            times = f"{plain * 1e6:.1f}", f"{best * 1e6:.1f}", f"{plain / best:.2f}", f"{plain / cell['other']:.2f}"
            lines.append(
                ("{}x{}".format(*cell["shape"]), cell["rows"], *times, f"{speed:.0f}", ", ".join(map(str, cut)))
            )
    header = ("shape", "rows", "bf16, us", "us", "times bf16", "runs_few.cu", "GB/s", "warps, stages, blocks, side")
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    budget, generator = Budget(given.seconds), torch.Generator("cuda").manual_seed(0)
    checks = check(generator)
    good = sum(error < LIMIT and same for _, error, same in checks)
    print(f"{good} of {len(checks)} right", *(c for c in checks if not (c[1] < LIMIT and c[2])), sep="\n", flush=True)
    cells: list[dict[str, Any]] = []
    for shape, rows in itertools.product(SHAPES, (1, 4)):
        if budget.left > 3:
            cells.append(timed(shape, rows, generator))
    given.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "checks": checks, "cells": cells}
    (given.out / "ternary_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    text = f"{machine().get('gpu')}. {good} checks of {len(checks)} passed. ternary-g64.\n\n{table(cells)}\n"
    (given.out / "ternary_gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
