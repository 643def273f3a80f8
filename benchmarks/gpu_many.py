"""The fused product for more rows on Hopper: checked against float64, then its cuts timed beside bfloat16.

    python benchmarks/gpu_many.py --seconds 140 --out FOLDER
    python benchmarks/gpu_many.py --checks "" --taken --rows 64,256,1024,2048,4096 --formats int8-g128,int3-g128

Every part is a process of its own, so that one that faults or hangs is told and the others go on. A cut is timed only
where its result was right in the same process. Where one is wrong the rows and outs that are wrong are said.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_many_checks import CHECKS, LIMIT, check, one, scheme_of, wanted, where_wrong
from whit.errors import KernelError
from whit.kernels.gpu import few, many, stream, tables, tiled, tuned, ways
from whit.kernels.gpu import kernel as gpu_kernel
from whit.kernels.gpu.many import Config

from gpu_harness import Budget, Kitchen, random_weights, random_x, seconds_cold
from harness import machine

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
FORMATS = "int4-g128,nf4,nf4-dq,int8-g128,int8-channel,int2-g64,int3-g128,int5-g128,int6-g128"
PROCESSORS = 132


def cuts(rows: int, shape: tuple[int, int], spec: str) -> list[Config]:
    """The cuts that are tried: those whose blocks fill a good part of the device, or most of them do."""
    scheme = scheme_of(spec, shape[1])
    bits, levels = scheme.storage.bits, bool(scheme.storage.levels)
    high = (32, 2, 4) if levels else (32, 2, 6) if bits <= 4 else (32, 4, 4)
    more = 2 if bits > 4 else 1  # steps of as many columns
    if rows <= 16 and bits == 4:
        kinds = ((1, 4, 2), (4, 2, 1)) if levels else ((1, 4, 2), (1, 3, 3), (4, 3, 1))
        found = [
            Config(groups, 2, stages, split, late=1, min_blocks=blocks)
            for groups, stages, blocks in kinds
            for split in (1, 2, 4, 8)
        ]
    elif rows <= 64:
        tiles = next(n for n in many.ROW_TILES if 8 * n >= rows)
        found = [
            Config(groups, tiles, stages, split, 1, 0, blocks, lead, apart=apart)
            for groups, stages, lead, blocks in ((2, 3 * more, 8, 1), (2, 3, 8, 2), (2, 4, 6, 2), (4, 2 * more, 6, 1))
            for split, apart in ((1, 0), (2, 0), (3, 0), (4, 1), (8, 1))
        ]
    elif rows <= 256:
        found = [Config(2, tiles, stages, split, lead=lead) for tiles, stages, lead in (high, (16, 3, 6))
                 for split in (1, 2, 3)]  # fmt: skip
    else:
        found = [Config(2, high[0], high[1], 1, pair, lead=high[2], halve=halve) for pair in (1, 2) for halve in (0, 1)]
    invariant = tuned.invariant_many(scheme, shape, rows, (9, PROCESSORS))
    return [*dict.fromkeys([*(c for c in found if is_sensible(c, rows, shape[0], levels)), invariant])]


def is_sensible(config: Config, rows: int, outs: int, levels: bool) -> bool:
    if not config.fits(levels):
        return False
    blocks, room = config.grid([outs], rows, 1 << 20)[0], PROCESSORS * config.min_blocks
    if config.split == 1:
        return rows > 256 or 2 * blocks > room
    return room < 3 * blocks <= 4 * room


def taken(rows: int, shape: tuple[int, int], spec: str) -> list[Config]:
    """The cut that is dispatched, if any."""
    found = best_many(scheme_of(spec, shape[1]), shape, rows, (9, PROCESSORS))
    return [] if found is None else [found]


best_many = tuned.best_many


def measure(
    every_rows: list[int], formats: list[str], seconds: float, into: Path, only_taken: bool
) -> list[dict[str, Any]]:
    """Seconds of bfloat16 and of every cut, over rows, formats and shapes; what is found is kept on the way."""
    kitchen, budget, found = Kitchen(), Budget(seconds), []
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)
    tuned.best_many = lambda *_: None  # type: ignore[assignment]
    work = [
        (rows, spec, shape, (taken if only_taken else cuts)(rows, shape, spec))
        for rows, shape, spec in itertools.product(every_rows, SHAPES, formats)
    ]
    kitchen.prepare(
        (many.SOURCE, cut.macros(scheme_of(spec, shape[1]), False).items())
        for _, spec, shape, every in work
        for cut in every
    )
    print(f"compiled {len(kitchen.done)} kernels, {budget.left:.0f} s left", flush=True)
    if not only_taken:
        prepare_now(kitchen, {(spec, shape, rows) for rows, spec, shape, _ in work})
    print(f"compiled what is taken now, {budget.left:.0f} s left", flush=True)
    plain: dict[tuple[int, tuple[int, int]], float] = {}
    first: dict[tuple[str, tuple[int, int]], Tensor] = {}
    for rows, spec, shape, every in work:
        if budget.left < 2:
            print(f"no time left for {rows} {spec} {shape}", flush=True)
            continue
        x = random_x(max(every_rows), shape[1], torch.Generator("cuda").manual_seed(shape[1]))[:rows].contiguous()
        if (rows, shape) not in plain:
            weights = [random_x(*shape, generator) for _ in range(max(-(-(400 << 20) // (2 * shape[0] * shape[1])), 2))]
            calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]
            plain[rows, shape] = seconds_cold(calls, 5)
            del weights, calls
        found.append(timed(spec, shape, x, every, plain[rows, shape], not only_taken))
        same_bits(found[-1], first)
        into.write_text(json.dumps(found, default=str))
    kitchen.pool.terminate()
    return found


def same_bits(found: dict[str, Any], first: dict[tuple[str, tuple[int, int]], Tensor]) -> None:
    """Whether the invariant cut gave the rows that it was given before the same bits."""
    y, key = found.pop("invariant_rows"), (found["spec"], found["shape"])
    if y is None:
        return
    known = first.setdefault(key, y)
    least = min(len(y), len(known))
    found["same_bits"] = torch.equal(y[:least], known[:least])
    if not found["same_bits"]:
        print(f"NOT INVARIANT: {key}, {found['rows']} rows", flush=True)


def prepare_now(kitchen: Kitchen, wanted: Iterable[tuple[str, tuple[int, int], int]]) -> None:
    """Compile what is taken for these."""
    sources: list[tuple[Path, Iterable[tuple[str, int]]]] = []
    for spec, shape, rows in wanted:
        scheme = scheme_of(spec, shape[1])
        _, cut = ways.plan(scheme, shape, rows, (9, PROCESSORS), False)
        if isinstance(cut, few.Config):
            case = few.case_for(scheme, cut, rows, shape[1])
            sources.append((few.SOURCE, few.macros(scheme, cut, case).items()))
        elif isinstance(cut, many.Config):
            sources.append((many.SOURCE, cut.macros(scheme, False).items()))
        elif isinstance(cut, stream.Config):
            tall = 8 * stream.row_tiles(rows)
            sources.append((stream.SOURCE, stream.macros(scheme, cut.whole, False, tall).items()))
        elif isinstance(cut, tiled.Config):
            sources.append((tiled.SOURCE, tiled.macros(scheme, cut.whole, False, True).items()))
            sources.append((tiled.ARRANGE, tiled.arrange_macros(scheme, cut.row_tiles).items()))
    kitchen.prepare(sources)


def error_on_gpu(found: Tensor, right: Tensor) -> float:
    error = ((found.to(right) - right).norm() / right.norm()).item()
    return error if error == error else float("inf")


def timed(
    spec: str, shape: tuple[int, int], x: Tensor, every: Iterable[Config], plain: float, beside: bool
) -> dict[str, Any]:
    """Seconds of each cut that is right; `beside`: and of what would be taken without this kernel."""
    scheme = scheme_of(spec, shape[1])
    weights = random_weights(spec, shape, torch.Generator("cuda").manual_seed(shape[0]))
    right, ranking = wanted(x, weights[0]), []
    invariant, invariant_rows = tuned.invariant_many(scheme, shape, len(x), (9, PROCESSORS)), None
    for cut in every:
        try:
            y = one(x, weights[0], None, scheme, cut)
            torch.cuda.synchronize()
            error = error_on_gpu(y, right)
            if not error < LIMIT:
                print(f"WRONG {spec} {shape} {len(x)} {cut}: {error:.1e} {where_wrong(y, right)}", flush=True)
                continue
            if not all(torch.equal(y, one(x, weights[0], None, scheme, cut)) for _ in range(3)):
                print(f"OTHER BITS {spec} {shape} {len(x)} {cut}", flush=True)
                continue
            if cut == invariant:
                invariant_rows = y[:64].clone()
            calls = [lambda w=w, c=cut: one(x, w, None, scheme, c) for w in weights]
            ranking.append((seconds_cold(calls, 5), astuple(cut)))
        except (KernelError, RuntimeError) as problem:
            print(f"FAIL {spec} {shape} {len(x)} {cut}: {str(problem)[:200]}", flush=True)
    ranking.sort()
    now = seconds_cold([lambda w=w: gpu_kernel.product(x, w, None) for w in weights], 5) if beside else None
    found = {
        "invariant": next((seconds for seconds, cut in ranking if cut == astuple(invariant)), None),
        "invariant_rows": invariant_rows,
        "now": now,
        "spec": spec,
        "shape": shape,
        "rows": len(x),
        "plain": plain,
        "bytes": weights[0].nbytes,
        "ranking": ranking,
    }
    if ranking:
        best, cut = ranking[0]
        rest = " ".join(f"{c}:{s * 1e6:.1f}" for s, c in ranking[1:])
        work = 2 * len(x) * shape[0] * shape[1] / best / 1e12
        speed = f"{found['bytes'] / best / 1e9:5.0f} GB/s {work:4.0f} TFLOP/s"
        without = f"now {plain / now:.2f}x " if now else ""
        times = f"bf16 {plain * 1e6:6.1f} us {without}{plain / best:.2f}x {best * 1e6:6.1f} us"
        print(f"{spec:9} {shape!s:13} rows {len(x):4} {times} {speed} {cut} | {rest}", flush=True)
    return found


def winners(found: Iterable[dict[str, Any]]) -> dict[tables.Key, many.Cut | None]:
    """Rows of the table: the fastest cut, or None where what is taken now is as fast."""
    table: dict[tables.Key, many.Cut | None] = {}
    for each in found:
        outs, columns = each["shape"]
        best, cut = min(each["ranking"], default=(float("inf"), None))
        key = tuned.kind(scheme_of(each["spec"], columns)), each["rows"], (outs, columns)
        table[key] = many.Config(*cut).values if cut and best < 0.98 * (each["now"] or best * 2) else None
    return table


def run(arguments: list[str], limit: float, log: Path) -> Any:
    """This script in a process of its own; what it found, or None."""
    log.with_suffix(".json").unlink(missing_ok=True)
    command = [sys.executable, __file__, *arguments, "--into", str(log.with_suffix(".json"))]
    try:
        status = subprocess.run(command, timeout=max(limit, 1)).returncode
        if status:
            print(f"{arguments}: FAILED with status {status}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{arguments}: HUNG, ended after {limit:.0f} s", flush=True)
    return json.loads(log.with_suffix(".json").read_text()) if log.with_suffix(".json").exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--rows", default="16,64,256,1024,4096,8,1", help="timed; empty: none")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--taken", action="store_true", help="time only the cuts that are dispatched")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "times":
        every_rows = [int(rows) for rows in given.rows.split(",")]
        measure(every_rows, given.formats.split(","), given.seconds, given.into, given.taken)
        return
    if given.part:
        given.into.write_text(json.dumps(check(given.part), default=str))
        return
    budget = Budget(given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine()}
    for part in [*filter(None, given.checks.split(",")), *(["times"] if given.rows else [])]:
        limit = min(80, budget.left) if part in CHECKS else budget.left
        if budget.left < 10:
            print(f"no time left for {part}")
            continue
        arguments = ["--part", part, "--seconds", f"{limit - 8:.0f}", "--rows", given.rows]
        arguments += ["--formats", given.formats]
        arguments += ["--taken"] if given.taken else []
        result[part] = run(arguments, limit, given.out / f"part_{part}")
        (given.out / "gpu_many.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    for key, cut in winners(result.get("times") or ()).items():
        print(f"    {key}: {cut},")
    print(f"done, {budget.left:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
