"""k-quants, ternary and binary on a GPU: python benchmarks/runs_gpu.py [--seconds 40] [--out results/runs_gpu.json]

First checks against the reference on the CPU: dequantizing bit for bit, products of 1 to 32 rows against float64 of the
same 16-bit weights. Then times beside torch's bf16 product: cold weights in CUDA graphs, medians, for each cut; for
more rows dequantizing with torch's product, and what the reference takes today.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels import reference
from whit.kernels.gpu import runs
from whit.kernels.gpu.runs import Config, Scheme
from whit.layouts import BITS
from whit.tensor import PackedWeight

from gpu_harness import Budget, Kitchen, copies, relative_error, seconds_cold
from harness import RESULTS, machine, markdown

SPECS = (
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q5_1", "q8_0", "iq4_xs", "iq4_nl", "mxfp4", "tq2_0", "ternary-g64",
    "ternary", "ternary-tensor-absmean", "binary-g64", "binary",
)  # fmt: skip
TIMED = ("q4_k", "q6_k", "q2_k", "q3_k", "q5_k", "ternary-g64", "binary-g64", "q8_0", "iq4_xs")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 4, 16, 32)
CUTS = (Config(8, 1, 3), Config(8, 2, 2), Config(8, 1, 4), Config(4, 1, 6), Config(16, 1, 2), Config(4, 2, 4))


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
    shape, found = (1016, 1280), []
    packed = random_packed(spec, shape, generator)
    scheme, there = scheme_of(packed), on_cpu(packed)
    for dtype in (torch.bfloat16, torch.float16):
        wanted = reference.dequantize(there, dtype)
        same = torch.equal(runs.dequantize(packed, dtype, scheme).cpu(), wanted)
        found.append((f"{spec} {dtype} dequantized", 0.0 if same else 1.0, 0.0))
        bias, exact = torch.randn(shape[0], device="cuda").to(dtype), wanted.double().cuda()
        for rows in (1, 3, 8, 16, 27):
            x = torch.randn(rows, shape[1], device="cuda", generator=generator).to(dtype)
            y = runs.multiply_few(x, packed, bias, scheme, CUTS[rows % len(CUTS)])
            error = relative_error(y, x.double() @ exact.T + bias.double())
            found.append((f"{spec} {dtype}, {rows} rows", error, 2.5e-3 if dtype == torch.bfloat16 else 4e-4))
    return found


def time_cells(spec: str, shape: tuple[int, int], dense: list[Tensor], generator: torch.Generator) -> dict[str, Any]:
    first = random_packed(spec, shape, generator)
    weights = [first, *(random_packed(spec, shape, generator) for _ in range(copies(first.nbytes) - 1))]
    scheme = scheme_of(first)
    cell: dict[str, Any] = {"spec": spec, "shape": shape, "bytes": first.nbytes, "rows": {}}
    for rows in ROWS:
        x, cuts = torch.randn(rows, shape[1], device="cuda", generator=generator).bfloat16(), {}
        for config in CUTS:
            try:
                cuts[str(config)] = seconds_cold(
                    [lambda x=x, w=w, c=config: runs.multiply_few(x, w, None, scheme, c) for w in weights]
                )
            except KernelError as error:
                print(f"{config}: {error}", flush=True)
        bf16 = seconds_cold([lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in dense])
        cell["rows"][rows] = {"bf16": bf16, "cuts": cuts}
    some = weights[: max(len(weights) // 4, 2)]
    cell["dequantize"] = seconds_cold([lambda w=w: runs.dequantize(w, torch.bfloat16, scheme) for w in some])
    return cell


def compile_all(kitchen: Kitchen) -> None:
    wanted = []
    for spec in SPECS:
        scheme = runs.scheme(parse_format(spec), 1280)
        assert not isinstance(scheme, str)
        wanted += [(runs.DEQUANTIZE, (scheme.macros | {"HALF": half}).items()) for half in (0, 1)]
        for half in (False, True):
            wanted += [
                (runs.FEW, runs.few_macros(scheme, CUTS[rows % len(CUTS)], half, rows).items())
                for rows in (1, 3, 8, 16, 27)
            ]
        if spec in TIMED:
            wanted += [(runs.FEW, runs.few_macros(scheme, c, False, rows).items()) for c in CUTS for rows in ROWS]
    kitchen.prepare(wanted)


def table(cells: list[dict[str, Any]]) -> str:
    """Times bf16 at each number of rows, and GB/s of packed bytes at one row."""
    lines = []
    for cell in cells:
        best = {rows: min(each["cuts"].values()) for rows, each in cell["rows"].items()}
        speeds = [f"{each['bf16'] / best[rows]:.2f}" for rows, each in cell["rows"].items()]
        written = 2 * cell["shape"][0] * cell["shape"][1] + cell["bytes"]
        lines.append((
            cell["spec"], "{}x{}".format(*cell["shape"]), *speeds, f"{cell['bytes'] / best[1] / 1e9:.0f}",
            f"{written / cell['dequantize'] / 1e9:.0f}",
        ))  # fmt: skip
    return markdown(("format", "shape", *(f"rows {n}" for n in ROWS), "GB/s, one row", "GB/s, dequantized"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40)
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
        dense = [
            torch.randn(shape, device="cuda", generator=seed).bfloat16() for _ in range(copies(2 * shape[0] * shape[1]))
        ]
        for spec in TIMED:
            if budget.left > 3:
                cells.append(time_cells(spec, shape, dense, seed))
    passed = f"{len(checks) - len(failed)} checks of {len(checks)} passed"
    text = f"{machine().get('gpu')}. {passed}. Times bf16.\n\n{table(cells)}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "checks": checks, "cells": cells}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
