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
from whit.kernels import reference
from whit.kernels.gpu import kernel as gpu_kernel
from whit.kernels.gpu import slab
from whit.tensor import PackedWeight

from gpu_few import plain_seconds, scheme_of
from gpu_harness import Budget, Kitchen, random_packed, random_weights, random_x, relative_error, seconds_cold
from harness import machine

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
CHECKED = ((4072, 4096), (520, 14336))
SPLITS = {4096: (1, 2, 4), 8192: (1, 2), 14336: (1, 2, 7)}  # by columns
INTEGERS = (  # outs, across, along, stages, blocks
    (256, 2, 4, 2, 1), (128, 2, 2, 2, 2), (256, 1, 4, 2, 2), (128, 4, 2, 2, 1), (64, 2, 1, 1, 6), (64, 8, 1, 1, 1),
    (64, 4, 2, 2, 1), (64, 2, 2, 2, 4), (64, 4, 1, 1, 3),
)  # fmt: skip
TABLES = (
    (128, 2, 4, 4, 1), (64, 4, 2, 2, 1), (64, 2, 2, 2, 2), (256, 2, 4, 2, 1), (128, 4, 4, 2, 1), (32, 8, 1, 2, 1),
    (32, 8, 1, 1, 1), (64, 8, 1, 1, 1),
)  # fmt: skip
WORK = "int4-g128:16,nf4:16,int4-g128:8,nf4:8,int4-g128:4,nf4:4,int4-g128:1,nf4:1,nf4-dq:16,nf4-dq:8,nf4-dq:1"
# Other formats, with float16 as well, in these cuts: (outs, across, along, stages, splits, blocks).
OTHERS = ("int4-g128", "nf4", "nf4-dq", "int4-g64", "int4-g128-f16", "int4-g32-f32", "fp4-g32")
OTHER_CUTS = ((64, 4, 1, 1, 1, 1), (128, 2, 2, 1, 2, 1), (32, 8, 1, 1, 1, 1), (64, 4, 1, 2, 4, 1))
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of relative errors
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


def wrong(packed: PackedWeight, config: slab.Config, x: torch.Tensor, bias: torch.Tensor | None) -> str:
    """What is wrong with three products, or nothing."""
    try:
        ys = [gpu_kernel.multiply_slab(x, packed, bias, scheme_of(str(packed.format)), config) for _ in range(3)]
    except KernelError as problem:
        return f"FAIL {str(problem)[:150]}"
    wanted = x.double() @ reference.dequantize(packed, torch.float32).double().T
    error = relative_error(ys[0], wanted if bias is None else wanted + bias.double())
    if not all(torch.equal(y, ys[0]) for y in ys):
        return "other bits in another run"
    return "" if error < LIMITS[x.dtype] else f"relative error {error:.1e}"


def check(work: Sequence[Work], generator: torch.Generator) -> dict[tuple[Any, ...], str]:
    """What is wrong with each cut: outs ragged, a bias, as many rows as each is built for, and fewer without a bias."""
    found: dict[tuple[Any, ...], str] = {}
    for (spec, rows), shape in itertools.product(work, CHECKED):
        packed, bias = random_packed(spec, shape, generator), random_x(1, shape[0], generator)[0]
        inputs = ((rows, bias), (max(rows * 3 // 4, 1), None))
        for config, (count, each) in itertools.product(configs(spec, rows, shape[1]), inputs):
            print("trying", spec, count, shape, astuple(config), end=" ", flush=True)
            problem = wrong(packed, config, random_x(count, shape[1], generator), each)
            found[spec, rows, config] = found.get((spec, rows, config), "") or problem
            print(problem or "right", flush=True)
    return found


def rows_of(cut: tuple[int, ...]) -> int:
    """Rows that another format's kernel is built for: some with room for 8, some for 16."""
    return 8 if cut[1] == 4 else 16


def check_others(generator: torch.Generator) -> dict[tuple[Any, ...], str]:
    """The same for other formats and float16."""
    found = {}
    for spec, dtype, cut in itertools.product(OTHERS, LIMITS, OTHER_CUTS):
        packed, rows = random_packed(spec, (1032, 4096), generator), rows_of(cut) - 3
        x, bias = random_x(rows, 4096, generator, dtype), random_x(1, 1032, generator, dtype)[0]
        print("trying", spec, dtype, rows, cut, end=" ", flush=True)
        found[spec, str(dtype), cut] = problem = wrong(packed, slab.Config(*cut), x, bias)
        print(problem or "right", flush=True)
    return found


def timed(
    spec: str, shape: tuple[int, int], rows: int, problems: dict[tuple[Any, ...], str], generator: torch.Generator
) -> dict[str, Any]:
    """Seconds of torch's bf16 product, of what is dispatched today and of each cut."""
    scheme, x = scheme_of(spec), random_x(rows, shape[1], generator)
    plain, weights = plain_seconds(shape, rows, generator), random_weights(spec, shape, generator)

    def seconds(config: slab.Config) -> float:
        return seconds_cold([lambda w=w: gpu_kernel.multiply_slab(x, w, None, scheme, config) for w in weights], 5)

    today = seconds_cold([lambda w=w: gpu_kernel.product(x, w, None) for w in weights], 5)
    usable = [config for config in configs(spec, rows, shape[1]) if not problems.get((spec, rows, config))]
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
    parser.add_argument("--others", action="store_true", help="check other formats and float16, too")
    parser.add_argument("--work", default=WORK, help="FORMAT:ROWS,...")
    given = parser.parse_args()
    work = [(spec, int(rows)) for spec, rows in (each.split(":") for each in given.work.split(",") if each)]
    kitchen, budget = Kitchen(), Budget(given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)
    every = {
        (scheme_of(spec), config, False, slab.rounded(rows))
        for (spec, rows), columns in itertools.product(work, SPLITS)
        for config in configs(spec, rows, columns)
    }
    if given.others:
        others = itertools.product(OTHERS, OTHER_CUTS, (False, True))
        every |= {(scheme_of(spec), slab.Config(*cut), half, rows_of(cut)) for spec, cut, half in others}
    kitchen.prepare((slab.SOURCE, config.macros(scheme, half, rows).items()) for scheme, config, half, rows in every)
    print(f"compiled {len(kitchen.done)}, {budget.left:.0f} s left", flush=True)
    problems = check(work, generator) | (check_others(generator) if given.others else {})
    print(f"slab: {sum(not each for each in problems.values())} of {len(problems)} cuts right", flush=True)
    result: dict[str, Any] = {"machine": machine(), "check": [(*key, each) for key, each in problems.items()]}
    entries = result["timed"] = []
    for (spec, rows), shape in itertools.product(work, SHAPES):
        if budget.left < 2:
            print(f"no time left for {spec} {rows} {shape}")
            continue
        entries.append(timed(spec, shape, rows, problems, generator))
        show(entries[-1])
        (given.out / "gpu_slab.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
