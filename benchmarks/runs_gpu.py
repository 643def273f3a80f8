"""ggml's types and binary on a GPU: python benchmarks/runs_gpu.py [--seconds 90] [--out results/runs_gpu.json]

First checks against the reference on the CPU: dequantizing bit for bit, products against float64. Then times beside
torch's bf16 product: cold weights in CUDA graphs, medians, for each way there is: runs_row.cu, many.cu, runs_few.cu,
and dequantizing with torch's product behind it. The table has the way that is dispatched.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.formats import parse_format
from whit.formats.ggml.kinds import KINDS
from whit.kernels import reference
from whit.kernels.gpu import kernel_runs, many, runs, runs_many, runs_row
from whit.kernels.gpu.runs import Scheme
from whit.layouts import BITS
from whit.tensor import PackedWeight

from gpu_harness import Budget, Kitchen, copies, relative_error, seconds_cold
from harness import RESULTS, machine, markdown

SPECS = (
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q5_1", "q8_0", "iq4_xs", "iq4_nl", "mxfp4", "tq2_0", "ternary-g64",
    "ternary", "ternary-tensor-absmean", "binary-g64", "binary",
)  # fmt: skip
TIMED = ("q4_k", "q6_k", "q5_k", "q8_0", "q4_0", "iq4_xs", "q3_k", "q2_k", "binary-g64")
GGML = tuple(spec for spec in SPECS if "ary" not in spec)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
REPLAYS = 5
FEWER = 256  # rows above which fewer types are timed, over fewer weights
TIMED_MORE = ("q4_k", "q6_k", "q8_0")
ROW_CUT = runs_row.Config(16, 1)  # what is checked
CHECKED_ROWS = (1, 3, 8)
CHECKED_MORE, CHECKED_HALF = (7, 27, 60, 250, 600), (60,)
FEW = (4, 8, 16)  # rows at which ggml's types are timed in runs_few.cu
CHECKED = (1016, 1536)
H100 = (9, 132)
HEAD = """# ggml's types and binary on a GPU

{gpu}, `python benchmarks/runs_gpu.py`, bfloat16. {passed}: products with float64,
dequantizing bit for bit. Times torch's bf16 product with cold weights in CUDA graphs, medians, of what is
dispatched: up to 4 rows runs_row.cu (2 where runs are 16 columns: q2_k, q3_k, q6_k), for more many.cu where the table
of measured cuts has it, up to 16 else runs_few.cu; for other rows the matrix is dequantized for torch's product. Every
way's times are in the .json."""
Way = tuple[str, Callable[[Tensor, PackedWeight], Tensor]]


def random_packed(spec: str, shape: tuple[int, int], generator: torch.Generator) -> PackedWeight:
    """Random bytes, and small positive numbers where they are floats."""
    format, tensors = parse_format(spec), {}
    for name, want in BITS.specs(format, shape).items():
        if want.dtype == torch.uint8:
            low, most = (110, 130) if name == "exponent" else (0, 243 if are_digits(spec, name) else 256)
            tensors[name] = torch.randint(low, most, want.shape, dtype=torch.uint8, device="cuda", generator=generator)
        else:
            tensors[name] = (torch.rand(want.shape, device="cuda", generator=generator) * 0.02 + 0.01).to(want.dtype)
    return PackedWeight(BITS.name, format, shape, tensors)


def are_digits(spec: str, name: str) -> bool:
    return name == "codes" and spec.startswith("ternary")


def scheme_of(packed: PackedWeight) -> Scheme:
    found = runs.scheme(packed.format, packed.shape[1])
    assert not isinstance(found, str), found
    return found


def on_cpu(packed: PackedWeight) -> PackedWeight:
    tensors = {name: tensor.cpu() for name, tensor in packed.tensors.items()}
    return PackedWeight(packed.layout, packed.format, packed.shape, tensors)


def check(spec: str, generator: torch.Generator) -> list[tuple[str, float, float]]:
    """Labels, errors, and what they may be."""
    packed = random_packed(spec, CHECKED, generator)
    dtypes = (torch.bfloat16, torch.float16)
    return [
        (f"{spec} {dtype} {name}", *rest) for dtype in dtypes for name, *rest in check_dtype(packed, dtype, generator)
    ]


def check_dtype(packed: PackedWeight, dtype: torch.dtype, generator: torch.Generator) -> list[tuple[str, float, float]]:
    """The same for activations of one type."""
    scheme, there, bf16 = scheme_of(packed), on_cpu(packed), dtype == torch.bfloat16
    rounded, few = reference.dequantize(there, dtype), runs.best(packed.shape, 7)
    exact = reference.dequantize(there, torch.float32).double().cuda()
    same = torch.equal(runs.dequantize(packed, dtype, scheme).cpu(), rounded)
    found, most = [("dequantized", 0.0 if same else 1.0, 0.0)], 2.5e-3 if bf16 else 4e-4
    bias = torch.randn(packed.shape[0], device="cuda").to(dtype)

    def add(name: str, rows: int, product: Callable[[Tensor], Tensor], weight: Tensor, most: float) -> None:
        x = torch.randn(rows, packed.shape[1], device="cuda", generator=generator).to(dtype)
        y = product(x)
        error = relative_error(y, x.double() @ weight.T + bias.double())
        found.append((f"{name}, {rows} rows", error if torch.equal(product(x), y) else float("inf"), most))

    add("few", 7, lambda x: runs.call(x, packed, bias, scheme, few).start()[0], rounded.double().cuda(), most)
    if str(packed.format) in GGML:
        for rows in CHECKED_ROWS if bf16 else CHECKED_ROWS[:1]:
            add("row", rows, lambda x: runs_row.call(x, packed, bias, ROW_CUT).start()[0], exact, most)
        for rows in CHECKED_MORE if bf16 else CHECKED_HALF:  # weights are rounded
            if more := many_cut(packed, rows):
                add(
                    "many",
                    rows,
                    lambda x, c=more: runs_many.call(x, packed, bias, c).start()[0],
                    rounded.double().cuda(),
                    most,
                )
    return found


def many_cut(packed: PackedWeight, rows: int) -> many.Config | None:
    return runs_many.best(runs_row.kind_of(packed), packed.shape, rows, H100)


def ways(packed: PackedWeight, rows: int) -> list[Way]:
    """What can multiply so many rows of bfloat16, by names."""
    scheme, found = scheme_of(packed), list[Way]()
    if str(packed.format) in GGML:
        if cut := runs_row.best(packed, rows):
            found.append((f"row {cut}", lambda x, w: runs_row.call(x, w, None, cut).start()[0]))
        if more := many_cut(packed, rows):
            found.append((f"many {more.values}", lambda x, w: runs_many.call(x, w, None, more).start()[0]))
    if rows in FEW or (str(packed.format) not in GGML and rows <= runs.MOST_ROWS):
        few = runs.best(packed.shape, rows)
        found.append((f"few {few}", lambda x, w: runs.call(x, w, None, scheme, few).start()[0]))
    if rows > runs.MOST_ROWS:
        found.append(("dequantized", lambda x, w: torch.nn.functional.linear(x, runs.dequantize(w, x.dtype, scheme))))
    return found


def time_cells(spec: str, shape: tuple[int, int], bf16: dict[int, float], generator: torch.Generator) -> dict[str, Any]:
    """Every way's times of a type and shape, beside `bf16`'s."""
    first = random_packed(spec, shape, generator)
    weights = [first, *(random_packed(spec, shape, generator) for _ in range(copies(first.nbytes) - 1))]
    weights = [kernel_runs.GpuRuns().prepare(weight) for weight in weights]
    cell: dict[str, Any] = {"spec": spec, "shape": shape, "bytes": first.nbytes, "rows": {}}
    for rows in ROWS:
        if rows > FEWER and spec not in TIMED_MORE:
            continue
        x, times = torch.randn(rows, shape[1], device="cuda", generator=generator).bfloat16(), {}
        some = weights if rows <= 16 else weights[: max(len(weights) // 2, 2) if rows <= FEWER else 4]
        for name, way in ways(weights[0], rows):
            try:
                times[name] = seconds_cold([lambda x=x, w=w, way=way: way(x, w) for w in some], REPLAYS)
            except KernelError as error:
                print(f"{spec} {shape} {rows} {name}: {error}", flush=True)
        taken = seconds_cold([lambda x=x, w=w: kernel_runs.GpuRuns().linear(x, w, None) for w in some], REPLAYS)
        cell["rows"][rows] = {"bf16": bf16[rows], "taken": taken, "ways": times}
    print(spec, shape, {n: f"{each['bf16'] / each['taken']:.2f}" for n, each in cell["rows"].items()}, flush=True)
    scheme = scheme_of(first)
    some = weights[: max(len(weights) // 4, 2)]
    cell["dequantize"] = seconds_cold([lambda w=w: runs.dequantize(w, torch.bfloat16, scheme) for w in some])
    return cell


def plain_times(shape: tuple[int, int], generator: torch.Generator) -> dict[int, float]:
    """Seconds of torch's bf16 product, by rows."""
    count = copies(2 * shape[0] * shape[1])
    dense = [torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(count)]
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device="cuda", generator=generator).bfloat16()
        some = dense if rows <= FEWER else dense[:4]
        found[rows] = seconds_cold([lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in some])
    return found


def many_cases(spec: str) -> set[tuple[many.Config, bool]]:
    """Cuts of many.cu that are checked, in both types, and those that are timed."""
    kind, rows = KINDS[spec], [n for n in ROWS if n <= FEWER or spec in TIMED_MORE]
    found = {(runs_many.best(kind, CHECKED, n, H100), False) for n in CHECKED_MORE}
    found |= {(runs_many.best(kind, CHECKED, n, H100), True) for n in CHECKED_HALF}
    if spec in TIMED:
        found |= {(runs_many.best(kind, shape, n, H100), False) for shape in SHAPES for n in rows}
    return {(cut, half) for cut, half in found if cut}


def row_cases(spec: str) -> set[tuple[int, bool, runs_row.Config]]:
    """The same of runs_row.cu: rows, whether in float16, cut."""
    found = {(rows, False, ROW_CUT) for rows in CHECKED_ROWS} | {(CHECKED_ROWS[0], True, ROW_CUT)}
    for shape in SHAPES if spec in TIMED else ():
        specs = BITS.specs(parse_format(spec), shape)
        tensors = {name: torch.empty(want.shape, dtype=want.dtype, device="meta") for name, want in specs.items()}
        packed = PackedWeight(BITS.name, parse_format(spec), shape, tensors)
        found |= {(rows, False, cut) for rows in ROWS if (cut := runs_row.best(packed, rows))}
    return found


def compile_all(kitchen: Kitchen) -> None:
    wanted = []
    for spec in SPECS:
        packed = PackedWeight(BITS.name, parse_format(spec), (16, CHECKED[1]), {})
        scheme = scheme_of(packed)
        wanted += [(runs.DEQUANTIZE, (scheme.macros | {"HALF": half}).items()) for half in (0, 1)]
        wanted += [
            (runs.FEW, runs.few_macros(scheme, runs.best(CHECKED, 7), half, 7).items()) for half in (False, True)
        ]
        if spec in TIMED:
            most = FEW if spec in GGML else (rows for rows in ROWS if rows <= runs.MOST_ROWS)
            few = {(runs.best(shape, rows), rows) for rows in most for shape in SHAPES}
            wanted += [(runs.FEW, runs.few_macros(scheme, c, False, rows).items()) for c, rows in few]
        if spec not in GGML:
            continue
        wanted += [(runs_row.SOURCE, runs_row.macros(packed, c, h, n).items()) for n, h, c in row_cases(spec)]
        wanted += [(many.SOURCE, runs_many.macros(KINDS[spec], *case).items()) for case in many_cases(spec)]
    kitchen.prepare(wanted)


def table(cells: list[dict[str, Any]]) -> str:
    """Times bf16 at each number of rows, and GB/s of packed bytes at one row."""
    lines = []
    for cell in cells:
        rows = cell["rows"]
        speeds = [f"{rows[n]['bf16'] / rows[n]['taken']:.2f}" if n in rows else "" for n in ROWS]
        written = 2 * cell["shape"][0] * cell["shape"][1] + cell["bytes"]
        lines.append((
            cell["spec"], "{}x{}".format(*cell["shape"]), *speeds, f"{cell['bytes'] / rows[1]['taken'] / 1e9:.0f}",
            f"{written / cell['dequantize'] / 1e9:.0f}",
        ))  # fmt: skip
    return markdown(("format", "shape", *(f"rows {n}" for n in ROWS), "GB/s, one row", "GB/s, dequantized"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--out", type=Path, default=RESULTS / "runs_gpu.json")
    args = parser.parse_args()
    budget, kitchen = Budget(args.seconds), Kitchen()
    compile_all(kitchen)
    kitchen.pool.terminate()
    print(f"compiled, {budget.left:.1f} s left", flush=True)
    seed = torch.Generator("cuda").manual_seed(0)
    checks = [row for spec in SPECS for row in check(spec, seed)]
    failed = [row for row in checks if not row[1] <= row[2]]
    print(f"{len(checks) - len(failed)} checks of {len(checks)} passed, {budget.left:.1f} s left", *failed, sep="\n")
    cells: list[dict[str, Any]] = []
    for shape in SHAPES:
        bf16 = plain_times(shape, seed)
        for spec in TIMED:
            if budget.left > 3:
                cells.append(time_cells(spec, shape, bf16, seed))
    passed = f"{len(checks) - len(failed)} checks of {len(checks)} passed"
    text = f"{HEAD.format(gpu=machine().get('gpu'), passed=passed)}\n\n{table(cells)}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "checks": checks, "cells": cells}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
