"""A bounded search for the tiled kernel's configurations; prints the rows of kernels/gpu/tables.py."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace
from typing import Any

import torch

from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels.gpu import launches, stream, tables, tiled, tuned, ways
from whit.kernels.gpu.stream import Scheme

from gpu_harness import Budget, Kitchen, random_weights, random_x, relative_error, seconds_cold
from gpu_tune import SHAPES, reference

Shape = tuple[int, int]
WORK = (
    ("int4-g128", 64), ("int4-g128", 256), ("int4-g128", 32), ("int4-g128", 128), ("int4-g128", 1024),
    ("nf4", 64), ("nf4", 256), ("int8", 64), ("int4-g128", 16), ("nf4", 32), ("nf4", 128), ("int8", 256),
    ("nf4", 1024), ("int2-g64", 64), ("int3-g128", 64), ("int4-g64-asym", 64),
)  # fmt: skip
SHARED = 227 << 10
# tiles, warpgroups, blocks per multiprocessor, by tiles of 8 rows
CUTS = {
    2: ((1, 2, 3), (1, 4, 1), (1, 1, 6), (2, 2, 2)), 4: ((1, 2, 3), (1, 2, 2), (1, 4, 1), (1, 1, 5), (2, 2, 1)),
    8: ((1, 2, 2), (1, 1, 4), (1, 3, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 1, 3)),
    16: ((1, 2, 1), (1, 3, 1), (1, 1, 2), (1, 1, 3), (2, 2, 1), (1, 4, 1)), 32: ((1, 2, 1), (1, 1, 1)),
}  # fmt: skip


def candidates(scheme: Scheme, rows: int) -> list[tiled.Config]:
    """Configurations that fit the shared memory, with one split."""
    wanted = (16, 32) if rows > 128 else (min(n for n in tiled.ROW_TILES if 8 * n >= rows),)
    found = []
    for n in wanted:
        for (tiles, groups, blocks), ahead, stages in itertools.product(CUTS[n], (2, 3), (3, 4, 6)):
            config = tiled.Config(tiles, groups, n, ahead, stages, 1, blocks)
            if tiled.shared_bytes(scheme, config) * blocks <= SHARED and (stages < 6 or n <= 8):
                found.append(config)
    return found


def tune_tiled(kitchen: Kitchen, budget: Budget, generator: torch.Generator) -> dict[str, Any]:
    """The best of the candidates for each (format, rows, shape), which the process then uses."""
    results: list[dict[str, Any]] = []
    table = tables.TILED.setdefault(torch.cuda.get_device_properties(0).major, {})
    for spec, rows in WORK:
        if budget.left < 8:
            print(f"no time left for {spec} at {rows} rows", flush=True)
            continue
        scheme = stream.scheme(parse_format(spec), 4096)
        assert not isinstance(scheme, str)
        configs = candidates(scheme, rows)
        kitchen.prepare_tiled((scheme, config, False, True) for config in configs)
        for shape in SHAPES:
            if budget.left < 3:
                break
            found = search(scheme, configs, spec, shape, rows, generator)
            results.append(found)
            if not found["ranking"]:
                continue
            seconds, best = found["ranking"][0]
            table[tuned.kind(scheme), rows, shape] = astuple(best)
            ways.plan.cache_clear()
            speed = 2 * rows * shape[0] * shape[1] / seconds / 1e12
            print(f"{spec:12} rows {rows:4} {shape!s:14} {seconds * 1e6:7.2f} us {speed:4.0f} T {best}", flush=True)
    print("TILED = {")
    for key, value in table.items():
        print(f"    {key}: {value},")
    print("}", flush=True)
    return {"tuned": results}


def search(
    scheme: Scheme, configs: list[tiled.Config], spec: str, shape: Shape, rows: int, generator: torch.Generator
) -> dict[str, Any]:
    """Time every configuration on one shape with two likely splits; the fastest dozen."""
    weights, x = random_weights(spec, shape, generator), random_x(rows, shape[1], generator)
    wanted = reference(x, weights[0])
    problems: list[str] = []
    timed: dict[tiled.Config, float] = {}
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def attempt(config: tiled.Config) -> None:
        fitted = tiled.fitted(config, scheme, shape[1])
        if fitted in timed:
            return
        timed[fitted] = float("inf")
        try:
            if tiled.build(scheme, fitted.whole, False, True, 0).resources()["local_bytes"] > 64:
                return
            error = relative_error(launches.multiply_tiled(x, weights[0], None, scheme, fitted), wanted)
            if error > 5e-3:
                problems.append(f"{fitted}: relative error {error:.1e}")
                return
            calls = [lambda w=w: launches.multiply_tiled(x, w, None, scheme, fitted) for w in weights]
            timed[fitted] = seconds_cold(calls, 3)
        except (KernelError, RuntimeError) as error:
            problems.append(f"{fitted}: {str(error)[:200]}")

    for config in configs:
        fill = multiprocessors * config.min_blocks / (-(-shape[0] // config.outs) * -(-rows // config.rows))
        for splits in sorted({max(int(fill), 1), max(round(fill / 2), 1)}):
            attempt(replace(config, splits=min(splits, 8)))
    for config in sorted(timed, key=lambda c: timed[c])[:2]:
        for splits in (1, 2, 3, 4, 6):
            attempt(replace(config, splits=splits))
    if problems:
        print(f"{spec} rows {rows} {shape}: {len(problems)} problems, the first: {problems[0]}", flush=True)
    ranking = sorted(((s, c) for c, s in timed.items() if s < 1), key=lambda r: r[0])
    named = {"spec": spec, "rows": rows, "shape": shape, "problems": problems[:20], "tried": len(timed)}
    return named | {"ranking": ranking[:12]}
