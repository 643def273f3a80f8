"""Integers of odd bits in groups of 32 and 64: python benchmarks/gpu_narrow.py [--seconds 60] [--out FOLDER]

Products as they are dispatched, against float64, then beside torch's bf16 product and dequantizing with torch's
product: cold weights in CUDA graphs, medians.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from whit.kernels.gpu import kernel, launches, narrow, scales
from whit.kernels.gpu.dequantize import dequantize

from gpu_harness import (
    Budget,
    copies,
    plain_seconds,
    random_packed,
    random_x,
    relative_error,
    right_product,
    seconds_cold,
)
from harness import RESULTS, markdown, save_checked, say_checks

CHECKED = (
    "int1-g32", "int1-g64", "int3-g32", "int3-g64", "int3-g64-asym", "int5-g32", "int5-g64", "int5-g32-asym",
    "int6-g32", "int6-g64", "int6-g64-f32", "int7-g32", "int7-g64-asym",
)  # fmt: skip
SPECS = ("int3-g64", "int5-g64", "int6-g64", "int3-g32")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
ROWS = (1, 4, 8, 16, 32, 64, 128)
LIMIT = 4e-3


def check(spec: str, generator: torch.Generator) -> list[tuple[str, bool]]:
    """Labels, and whether the product was right, and the same again."""
    found = []
    for shape, rows in itertools.product(((1000, 4096), (130, 14336)), (3, 8, 16, 31, 64, 150)):
        packed, x = random_packed(spec, shape, generator), random_x(rows, shape[1], generator)
        bias = random_x(1, shape[0], generator)[0]
        y, again = (kernel.product(x, packed, bias) for _ in range(2))
        right = relative_error(y, right_product(x, packed, bias)) < LIMIT and torch.equal(y, again)
        found.append(("{} {}x{} {} rows".format(spec, *shape, rows), right))
    return found


def timed(spec: str, shape: tuple[int, int], generator: torch.Generator) -> list[dict[str, Any]]:
    """Seconds of bf16, as dispatched and dequantized, by rows."""
    first = random_packed(spec, shape, generator)
    weights = [first, *(random_packed(spec, shape, generator) for _ in range(copies(first.nbytes) - 1))]
    scheme, stored = narrow.scheme(first.format, shape[1]), scales.storage(first.format)
    assert scheme is not None
    cells = []
    for rows in ROWS:
        x = random_x(rows, shape[1], generator)
        ours = seconds_cold([lambda w=w, x=x: kernel.product(x, w, None) for w in weights], 5)
        other = seconds_cold(
            [lambda w=w, x=x: torch.nn.functional.linear(x, dequantize(w, x.dtype, stored)) for w in weights], 3
        )
        plan, plain = narrow.plan(scheme, shape, rows, launches.device_of(x)), plain_seconds(shape, rows, generator)
        cell = {"spec": spec, "shape": shape, "rows": rows, "bytes": first.nbytes, "bf16": plain, "us": ours}
        cells.append(cell | {"dequantized": other, "way": plan[0] if plan else "dequantize"})
        print(
            spec,
            shape,
            rows,
            f"{plain * 1e6:.1f} {ours * 1e6:.1f} {plain / ours:.2f} {plain / other:.2f}",
            plan,
            flush=True,
        )
    return cells


def table(cells: list[dict[str, Any]]) -> str:
    """A line for a format and shape, a column for rows: times bf16."""
    lines = []
    for spec, shape in dict.fromkeys((cell["spec"], tuple(cell["shape"])) for cell in cells):
        here = {cell["rows"]: cell for cell in cells if (cell["spec"], tuple(cell["shape"])) == (spec, shape)}
        of = [f"{cell['bf16'] / cell['us']:.2f} {cell['way'][0]}" for cell in here.values()]
        lines.append(
            (spec, "{}x{}".format(*shape), *of, f"{here[ROWS[-1]]['bf16'] / here[ROWS[-1]]['dequantized']:.2f}")
        )
    return markdown(("format", "shape", *(f"{n} rows" for n in ROWS), f"{ROWS[-1]} rows dequantized"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    budget, generator = Budget(given.seconds), torch.Generator("cuda").manual_seed(0)
    checks = [found for spec in CHECKED for found in check(spec, generator)]
    say_checks(checks)
    cells: list[dict[str, Any]] = []
    for shape, spec in itertools.product(SHAPES, SPECS):
        if budget.left > 4:
            cells += timed(spec, shape, generator)
    save_checked("gpu_narrow", checks, cells, table(cells), given.out)


if __name__ == "__main__":
    main()
