"""The kernel for up to 8 rows on a GPU: checked against float64, then its cuts timed beside streaming and bfloat16.

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

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (1024, 4096))
SPECS = ("int4-g128", "nf4", "nf4-dq", "int8", "int3-g128", "int4-g64-asym", "int2-g64")
MORE_ROWS = ("int4-g128", "nf4", "nf4-dq")  # also with 8 rows
CUTS = ((4, 4, 4), (4, 8, 3), (8, 2, 2), (8, 2, 3), (8, 4, 2), (8, 8, 2), (16, 2, 1), (16, 4, 1))
CONFIGS = tuple(few.Config(*cut) for cut in CUTS)
LIMIT = 5e-3


def schemes(specs: Sequence[str]) -> dict[str, stream.Scheme]:
    found = {spec: stream.scheme(parse_format(spec), 4096) for spec in specs}
    return {spec: scheme for spec, scheme in found.items() if not isinstance(scheme, str)}


def wanted(x: Tensor, packed: PackedWeight) -> Tensor:
    return x.double() @ dequantize(packed, torch.bfloat16).double().T


def check(budget: Budget, generator: torch.Generator) -> list[dict[str, Any]]:
    """Relative errors over formats, rows and cuts, outs ragged."""
    found = []
    for spec, scheme in schemes(SPECS).items():
        packed = random_packed(spec, (4072, 4096), generator)
        for rows, config in itertools.product((1, 3, 8), (CONFIGS[0], CONFIGS[4])):
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
    for ahead, stages, splits, blocks in itertools.product((2, 3), (4, 6), (1, 2, 3, 5), (2, 3)):
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
        if not few.fits(scheme, config, rows, shape[1]):
            continue
        try:
            if few.build(scheme, config, False, few.rounded(rows), 1, 0).resources()["local_bytes"]:
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
    for (spec, scheme), config in itertools.product(schemes(SPECS).items(), CONFIGS):
        for rows in (1, 8) if spec in MORE_ROWS else (1,):
            sources.append((few.SOURCE, few.macros(scheme, config, False, rows).items()))
    for scheme, config, rows in itertools.product(schemes(SPECS).values(), (CONFIGS[0], CONFIGS[4]), (3, 8)):
        sources.append((few.SOURCE, few.macros(scheme, config, False, rows).items()))
    kitchen.prepare(sources)
    int4 = schemes(["int4-g128"])["int4-g128"]
    cuts = itertools.product((2, 3), (4, 6), (2, 3))
    kitchen.prepare_tiled((int4, tiled.Config(1, 2, 4, a, s, 1, b), False, True) for a, s, b in cuts)
    print(f"compiled, {budget.left:.0f} s left", flush=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "early": early,
        "check": check(budget, generator),
        "six": six_stages(generator),
    }
    print(f"checked, {budget.left:.0f} s left", flush=True)
    plain: dict[tuple[tuple[int, int], int], float] = {}
    for shape, rows in itertools.product(SHAPES, (1, 8)):
        weights = [random_x(*shape, generator) for _ in range(max(-(-(400 << 20) // (2 * shape[0] * shape[1])), 2))]
        x = random_x(rows, shape[1], generator)
        plain[shape, rows] = seconds_cold([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights])
    result["plain"] = [(shape, rows, seconds) for (shape, rows), seconds in plain.items()]
    entries = result["timed"] = []
    work = [(spec, rows) for rows in (1, 8) for spec in (SPECS if rows == 1 else MORE_ROWS)]
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
    print(f"done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
