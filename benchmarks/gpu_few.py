"""The kernel for up to 16 rows on a GPU: checked against float64, then its cuts timed beside streaming and bfloat16.

    python benchmarks/gpu_few.py --seconds 80 --out FOLDER

Also looks at the six-stage cuts of the tiled kernel that were once not finite: which outs, rows and splits are wrong.
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
from torch import Tensor

from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels import dequantize
from whit.kernels.gpu import few, stream, tiled, tuned
from whit.kernels.gpu import kernel as gpu_kernel
from whit.tensor import PackedWeight

from gpu_harness import (
    Budget,
    Kitchen,
    early_works,
    random_packed,
    random_weights,
    random_x,
    relative_error,
    seconds_cold,
)
from harness import machine

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (28672, 8192))
SPECS = ("int4-g128", "nf4-dq", "nf4", "int8", "int4-g64-asym", "int3-g128", "int2-g64")
MORE_ROWS = ("int4-g128", "nf4-dq")  # also with 16 rows
CUTS = ((8, 2, 2), (8, 4, 2), (16, 2, 1), (16, 4, 1), (8, 2, 3))
CONFIGS = tuple(few.Config(*cut) for cut in CUTS)
MOST_SPILLED = 128  # bytes per thread
LIMIT = 5e-3


def schemes(specs: Sequence[str]) -> dict[str, stream.Scheme]:
    found = {spec: stream.scheme(parse_format(spec), 4096) for spec in specs}
    return {spec: scheme for spec, scheme in found.items() if not isinstance(scheme, str)}


def case_of(scheme: stream.Scheme, config: few.Config, rows: int, columns: int) -> few.Case:
    """What is compiled for x (rows, columns) in bfloat16."""
    cuts = few.slices(scheme, config, rows, columns)
    return few.Case(False, few.rounded(rows), 1, few.is_even(scheme, config, columns, cuts))


def wanted(x: Tensor, packed: PackedWeight) -> Tensor:
    return x.double() @ dequantize(packed, torch.bfloat16).double().T


def check(budget: Budget, generator: torch.Generator) -> list[dict[str, Any]]:
    """Relative errors over formats, rows and cuts, outs ragged."""
    found = []
    for spec, scheme in schemes(SPECS).items():
        packed = random_packed(spec, (4072, 4096), generator)
        for rows, config in itertools.product((3, 16), CONFIGS[1:2]):
            x = random_x(rows, 4096, generator)
            (y,) = gpu_kernel.multiply_few(x, [packed], [None], scheme, config)
            (again,) = gpu_kernel.multiply_few(x, [packed], [None], scheme, config)
            error = relative_error(y, wanted(x, packed))
            found.append({"spec": spec, "rows": rows, "config": astuple(config), "error": error})
            if not error < LIMIT or not torch.equal(y, again):
                print("WRONG", found[-1], "same twice:", torch.equal(y, again), flush=True)
    good = sum(each["error"] < LIMIT for each in found)
    print(f"few rows: {good} of {len(found)} right, largest {max(e['error'] for e in found):.1e}", flush=True)
    return found


def six_stages(generator: torch.Generator) -> list[dict[str, Any]]:
    """The cuts that were not finite, and some beside them."""
    spec, shape, rows = "int4-g128", (14336, 4096), 32
    scheme = schemes([spec])[spec]
    packed, x = random_packed(spec, shape, generator), random_x(rows, 4096, generator)
    right, found = wanted(x, packed), []
    for ahead, stages, splits, blocks in itertools.product((2, 3), (6,), (3, 5), (3,)):
        config = tiled.fitted(tiled.Config(1, 2, 4, ahead, stages, splits, blocks), scheme, 4096)
        local = tiled.build(scheme, config.whole, False, True, 0).resources()["local_bytes"]
        errors, bad = [], ""
        for _ in range(3):
            y = gpu_kernel.multiply_tiled(x, packed, None, scheme, config).double()
            errors.append(((y - right).norm() / right.norm()).item())
            wrong = ~((y - right).abs() < 0.05 * right.abs().max())
            if wrong.any():
                at = wrong.nonzero()
                blocks_hit = sorted({int(o) // 128 for o in at[:, 1].tolist()})
                outs_hit, rows_hit = {int(o) % 128 for o in at[:, 1].tolist()}, set(at[:, 0].tolist())
                bad = f"{len(at)} wrong, {int((~y.isfinite()).sum())} not finite, {len(blocks_hit)} blocks "
                bad += f"{blocks_hit[:12]}, rows {sorted(rows_hit)[:9]}, outs {sorted(outs_hit)[:20]}"
        left = int(packed.tensors[gpu_kernel.ARRIVED].abs().sum())
        packed.tensors[gpu_kernel.ARRIVED].zero_()
        found.append({"config": astuple(config), "local": local, "errors": errors, "left": left, "bad": bad})
        if bad or left:
            print("SIX", found[-1], flush=True)
    print(f"six stages: {sum(not e['bad'] for e in found)} of {len(found)} right", flush=True)
    return found


def timed(spec: str, shape: tuple[int, int], rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Seconds of each cut, of streaming as it is dispatched now, and of bfloat16."""
    scheme = schemes([spec])[spec]
    if scheme.step * (shape[1] // scheme.step) != shape[1]:
        return {}
    weights, x = random_weights(spec, shape, generator), random_x(rows, shape[1], generator)
    where = gpu_kernel.device_of(x)
    streaming = stream.fitted(tuned.best(scheme, shape, rows, where), scheme, shape[1])
    found: dict[str, Any] = {"spec": spec, "shape": shape, "rows": rows, "bytes": weights[0].nbytes}
    calls = [lambda w=w: gpu_kernel.multiply(x, w, None, scheme, streaming) for w in weights]
    found["stream"] = seconds_cold(calls, 5)
    right = wanted(x, weights[0])
    ranking = []
    for config in CONFIGS:
        if not few.fits(scheme, config, rows):
            continue
        try:
            case = case_of(scheme, config, rows, shape[1])
            if few.build(scheme, config, case, 0).resources()["local_bytes"] > MOST_SPILLED:
                continue
            error = relative_error(gpu_kernel.multiply_few(x, weights[:1], [None], scheme, config)[0], right)
            if not error < LIMIT:
                print(f"WRONG {spec} {shape} {rows} {config}: {error:.1e}", flush=True)
                continue
            calls = [lambda w=w, c=config: gpu_kernel.multiply_few(x, [w], [None], scheme, c) for w in weights]
            ranking.append((seconds_cold(calls, 5), astuple(config)))
        except (KernelError, RuntimeError) as problem:
            print(f"FAIL {spec} {shape} {rows} {config}: {str(problem)[:200]}", flush=True)
    found["ranking"] = sorted(ranking)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    given = parser.parse_args()
    kitchen, budget = Kitchen(), Budget(given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)
    early = early_works()
    sources = []
    for (spec, scheme), config, shape in itertools.product(schemes(SPECS).items(), CONFIGS, SHAPES):
        for rows in (1, 16) if spec in MORE_ROWS else (1,):
            sources.append((few.SOURCE, few.macros(scheme, config, case_of(scheme, config, rows, shape[1])).items()))
    for scheme, rows in itertools.product(schemes(SPECS).values(), (3, 16)):
        case = case_of(scheme, CONFIGS[1], rows, 4096)
        sources.append((few.SOURCE, few.macros(scheme, CONFIGS[1], case).items()))
    kitchen.prepare(sources)
    int4 = schemes(["int4-g128"])["int4-g128"]
    kitchen.prepare_tiled((int4, tiled.Config(1, 2, 4, ahead, 6, 1, 3), False, True) for ahead in (2, 3))
    print(f"compiled, {budget.left:.0f} s left", flush=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "early": early,
        "check": check(budget, generator),
        "six": six_stages(generator),
    }
    print(f"checked, {budget.left:.0f} s left", flush=True)
    plain: dict[tuple[tuple[int, int], int], float] = {}
    for shape, rows in itertools.product(SHAPES, (1, 16)):
        weights = [random_x(*shape, generator) for _ in range(max(-(-(400 << 20) // (2 * shape[0] * shape[1])), 2))]
        x = random_x(rows, shape[1], generator)
        plain[shape, rows] = seconds_cold([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights])
    result["plain"] = [(shape, rows, seconds) for (shape, rows), seconds in plain.items()]
    entries = result["timed"] = []
    work = [(spec, rows) for rows in (1, 16) for spec in (MORE_ROWS if rows > 1 else SPECS)]
    work.sort(key=lambda each: each[0] not in MORE_ROWS)
    for (spec, rows), shape in itertools.product(work, SHAPES):
        if budget.left < 2:
            print(f"no time left for {spec} {rows} {shape}")
            continue
        entries.append(found := timed(spec, shape, rows, generator))
        if found and found["ranking"]:
            best, config = found["ranking"][0]
            bf16 = plain[shape, rows]
            speed = found["bytes"] / best / 1e9
            others = " ".join(f"{c}:{s * 1e6:.1f}" for s, c in found["ranking"][1:4])
            print(
                f"{spec:13} {shape!s:14} rows {rows} bf16 {bf16 * 1e6:6.1f} stream {bf16 / found['stream']:.2f}x "
                f"few {bf16 / best:.2f}x {best * 1e6:6.1f} us {speed:5.0f} GB/s {config} | {others}", flush=True,
            )  # fmt: skip
        (given.out / "gpu_few.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    for found in entries:
        if found and found["ranking"]:
            key = tuned.kind(schemes([found["spec"]])[found["spec"]]), found["rows"], tuple(found["shape"])
            print(f"    {key}: {found['ranking'][0][1]},  # {found['bytes'] / found['ranking'][0][0] / 1e9:.0f} GB/s")
    print(f"done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
