"""The kernel for up to 16 rows on a GPU: checked against float64, then its cuts timed beside bfloat16.

python benchmarks/gpu_few.py --seconds 80 --out FOLDER
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
from whit.kernels.gpu import few, launches, stream, tuned
from whit.tensor import PackedWeight

from gpu_harness import (
    Budget,
    Kitchen,
    random_packed,
    random_weights,
    random_x,
    relative_error,
    seconds_cold,
)
from harness import machine

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
NF4 = (
    (8, 2, 2, 2), (8, 2, 2, 2, 1), (8, 4, 2, 2), (8, 4, 2, 2, 1), (4, 2, 4, 2), (4, 4, 4, 2), (16, 2, 1, 2),
    (8, 1, 2, 2), (8, 2, 3, 2), (7, 2, 2, 2), (14, 2, 1, 2), (8, 4, 2), (16, 4, 1, 2, 1),
)  # fmt: skip
INT4 = (
    (8, 2, 2), (8, 4, 2), (8, 2, 3), (4, 2, 4), (4, 4, 4), (7, 2, 2), (7, 4, 2), (8, 1, 2), (8, 1, 3),
    (16, 2, 1), (14, 2, 1),
)  # fmt: skip
SOME = ((16, 2, 1), (16, 4, 1), (16, 1, 1), (14, 2, 1), (8, 2, 2), (8, 4, 2), (8, 1, 2))
NF4_SOME = ((16, 2, 1, 2), (16, 2, 1, 2, 1), (8, 2, 2, 2), (16, 1, 1, 2), (14, 2, 1, 2), (8, 4, 2, 2), (16, 4, 1, 2))
OTHERS = ((16, 2, 1), (16, 1, 1), (16, 4, 1), (8, 2, 2), (8, 4, 2), (8, 2, 2, 2))
CUTS = {
    ("nf4", 1): NF4,
    ("nf4-dq", 1): NF4,
    ("int3-g128", 1): (
        (8, 4, 2), (8, 2, 2), (8, 2, 2, 2), (8, 1, 2, 2), (8, 1, 2, 4), (8, 2, 2, 4), (7, 2, 2, 2), (7, 1, 2, 4),
        (4, 2, 4, 2), (4, 1, 4, 4), (4, 2, 4, 4), (14, 1, 1, 4), (8, 1, 3, 2), (8, 2, 3, 2),
    ),
    ("int2-g64", 1): (
        (8, 4, 2), (8, 2, 2, 4), (8, 1, 2, 4), (7, 2, 2, 4), (4, 2, 4, 4), (8, 1, 3, 4), (8, 4, 2, 2), (8, 2, 2, 2),
        (4, 1, 4, 4), (7, 1, 2, 4), (8, 2, 3, 4), (8, 2, 3, 2), (4, 4, 4, 4),
    ),
    ("int4-g64-asym", 1): ((8, 2, 2, 2), (8, 4, 2, 2), (16, 2, 1, 2), (8, 1, 2, 2), (4, 2, 4, 2), (7, 2, 2, 2)),
    ("int4-g128", 1): INT4,
    ("int8", 1): ((8, 4, 2), (8, 2, 3), (8, 2, 2), (4, 4, 4), (7, 4, 2), (16, 4, 1), (8, 8, 2)),
    ("nf4", 4): NF4_SOME,
    ("nf4-dq", 4): NF4_SOME,
    ("int4-g128", 4): SOME,
    ("nf4", 8): SOME,
    ("nf4-dq", 8): SOME,
    ("int4-g128", 8): SOME,
    ("nf4", 16): SOME,
    ("int4-g128", 16): SOME,
    **{(spec, rows): OTHERS for spec in ("int2-g64", "int3-g128", "int8") for rows in (4, 8, 16)},
}  # fmt: skip
Work = tuple[str, int]
MOST_SPILLED = 128  # bytes per thread
LIMIT = 5e-3


def scheme_of(spec: str) -> stream.Scheme:
    found = stream.scheme(parse_format(spec), 4096)
    assert not isinstance(found, str), found
    return found


def wanted(x: Tensor, packed: PackedWeight) -> Tensor:
    return x.double() @ dequantize(packed, torch.bfloat16).double().T


def check(work: Sequence[Work], generator: torch.Generator) -> list[dict[str, Any]]:
    """Relative errors over formats and cuts, outs ragged, with as many rows as each takes."""
    found = []
    for spec, rows in work:
        scheme, packed = scheme_of(spec), random_packed(spec, (4072, 4096), generator)
        for config in configs(spec, rows):
            x = random_x(rows, 4096, generator)
            try:
                ys = [launches.by_few(x, [packed], [None], scheme, config).start()[0] for _ in range(3)]
            except KernelError as problem:
                print(f"FAIL {spec} {rows} {config}: {str(problem)[:200]}", flush=True)
                continue
            error, same = relative_error(ys[0], wanted(x, packed)), all(torch.equal(y, ys[0]) for y in ys)
            found.append({"spec": spec, "rows": rows, "config": astuple(config), "error": error, "same": same})
            if not error < LIMIT or not same:
                print("WRONG", found[-1], flush=True)
    good = sum(each["error"] < LIMIT and each["same"] for each in found)
    print(f"few rows: {good} of {len(found)} right, largest {max(e['error'] for e in found):.1e}", flush=True)
    return found


def configs(spec: str, rows: int) -> list[few.Config]:
    every = [few.Config(*cut) for cut in CUTS[spec, rows]]
    return [config for config in every if few.fits(scheme_of(spec), config, rows)]


def timed(spec: str, shape: tuple[int, int], rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Seconds of each cut, and of what is dispatched now."""
    scheme = scheme_of(spec)
    weights, x = random_weights(spec, shape, generator), random_x(rows, shape[1], generator)
    found: dict[str, Any] = {"spec": spec, "shape": shape, "rows": rows, "bytes": weights[0].nbytes}
    right, ranking = wanted(x, weights[0]), []
    for config in configs(spec, rows):
        try:
            case = few.case_for(scheme, config, rows, shape[1])
            if few.build(scheme, config, case, 0).resources()["local_bytes"] > MOST_SPILLED:
                continue
            error = relative_error(launches.by_few(x, weights[:1], [None], scheme, config).start()[0], right)
            if not error < LIMIT:
                print(f"WRONG {spec} {shape} {rows} {config}: {error:.1e}", flush=True)
                continue
            calls = [lambda w=w, c=config: launches.by_few(x, [w], [None], scheme, c).start() for w in weights]
            ranking.append((seconds_cold(calls, 5), astuple(config)))
        except (KernelError, RuntimeError) as problem:
            print(f"FAIL {spec} {shape} {rows} {config}: {str(problem)[:200]}", flush=True)
    found["ranking"] = sorted(ranking)
    return found


def plain_seconds(shape: tuple[int, int], rows: int, generator: torch.Generator) -> float:
    """torch's bf16 product."""
    weights = [random_x(*shape, generator) for _ in range(max(-(-(400 << 20) // (2 * shape[0] * shape[1])), 2))]
    x = random_x(rows, shape[1], generator)
    return seconds_cold([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def prepare(kitchen: Kitchen, work: Sequence[Work]) -> None:
    """Compile what is checked and timed."""
    sources = []
    for (spec, rows), shape in itertools.product(work, SHAPES):
        scheme = scheme_of(spec)
        for config in configs(spec, rows):
            sources.append(
                (few.SOURCE, few.macros(scheme, config, few.case_for(scheme, config, rows, shape[1])).items())
            )
    kitchen.prepare(sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--work", default=",".join(f"{spec}:{rows}" for spec, rows in CUTS), help="FORMAT:ROWS,...")
    given = parser.parse_args()
    work = [(spec, int(rows)) for spec, rows in (each.split(":") for each in given.work.split(","))]
    kitchen, budget = Kitchen(), Budget(given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)
    prepare(kitchen, work)
    print(f"compiled {len(kitchen.done)}, {budget.left:.0f} s left", flush=True)
    result: dict[str, Any] = {"machine": machine(), "check": check(work, generator)}
    print(f"checked, {budget.left:.0f} s left", flush=True)
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
        if found["ranking"]:
            best, config = found["ranking"][0]
            bf16 = plain[shape, rows]
            speed = found["bytes"] / best / 1e9
            others = " ".join(f"{c}:{s * 1e6:.1f}" for s, c in found["ranking"][1:])
            times = f"bf16 {bf16 * 1e6:6.1f} few {bf16 / best:.2f}x {best * 1e6:6.1f} us {speed:5.0f} GB/s"
            print(f"{spec:13} {shape!s:14} rows {rows} {times} {config} | {others}", flush=True)
        (given.out / "gpu_few.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (given.out / "gpu_few.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    for found in entries:
        if found["ranking"]:
            key = tuned.kind(scheme_of(found["spec"])), found["rows"], tuple(found["shape"])
            print(f"    {key}: {found['ranking'][0][1]},  # {found['bytes'] / found['ranking'][0][0] / 1e9:.0f} GB/s")
    print(f"done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
