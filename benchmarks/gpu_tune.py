"""A bounded search for the fused kernel's configurations; prints the rows of kernels/gpu/tuned.py."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels import dequantize
from whit.kernels.gpu import launches, stream, tuned
from whit.kernels.gpu.stream import Config, Scheme
from whit.tensor import PackedWeight

from gpu_harness import Budget, Kitchen, random_weights, random_x, relative_error, seconds_cold

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
WORK = (
    ("int4-g128", 1), ("nf4", 1), ("int4-g128", 16), ("nf4", 16), ("int4-g128", 64), ("nf4", 64), ("int8", 1),
    ("int8", 64), ("int2-g64", 1), ("int3-g128", 1), ("int4-g128", 32), ("nf4", 32), ("int8", 16), ("int8", 32),
    ("nf4-dq", 1), ("int4-g64-asym", 1), ("int4-g64-asym", 16), ("int2-g64", 16), ("int3-g128", 16),
)  # fmt: skip
WARPS = ((4, 2), (2, 4), (8, 1), (2, 2), (1, 4), (4, 4), (1, 8))
SPLITS = (1, 2, 3, 4, 6, 8, 12)


def candidates(scheme: Scheme, rows: int) -> list[Config]:
    """Configurations that fit the registers and the shared memory, with one split."""
    base = max(tuned.BYTES_AHEAD * 8 // (scheme.chunk * scheme.storage.bits), 1)
    tiles = (1, 2) if rows <= 16 else (1,) if rows > 32 else (1, 2)
    found = []
    for tile, (wo, wk), depth in itertools.product(tiles, WARPS, sorted({max(base // 2, 1), base, 2 * base})):
        threads = 32 * wo * wk
        held = tile * depth * scheme.chunk * scheme.storage.bits // 8  # bytes per row of a thread
        if held > 128 or (rows > 8 and wo == 1):
            continue
        per_sm = (512, 768) if tile * stream.row_tiles(rows) <= 2 else (256, 512)
        for blocks in sorted({max(resident // threads, 1) for resident in per_sm}):
            config = Config(tile, wo, wk, depth, 1, blocks)
            if stream.shared_bytes(scheme, config, rows) * blocks <= 220 << 10:
                found.append(config)
    return found


def tune(kitchen: Kitchen, budget: Budget, generator: torch.Generator) -> dict[str, Any]:
    """The best of the candidates for each (format, rows, shape), in order of importance, while the budget lasts."""
    results: list[dict[str, Any]] = []
    for spec, rows in WORK:
        scheme = stream.scheme(parse_format(spec), 4096)
        assert not isinstance(scheme, str)
        configs = candidates(scheme, rows)
        if budget.left < 8:
            print(f"no time left for {spec} at {rows} rows", flush=True)
            continue
        kitchen.prepare_streams((scheme, config, False, rows) for config in configs)
        for shape in SHAPES:
            if budget.left < 2:
                break
            results.append(search(spec, scheme, configs, shape, rows, generator))
            best = results[-1]["ranking"][0]
            print(
                f"{spec:14} rows {rows:3} {shape!s:15} {best[0] * 1e6:7.2f} us {best[1]:6.0f} GB/s {best[2]}",
                flush=True,
            )
    print_table(results)
    return {"tuned": results}


def search(
    spec: str, scheme: Scheme, configs: list[Config], shape: tuple[int, int], rows: int, generator: torch.Generator
) -> dict[str, Any]:
    """Time every configuration on one shape: with two likely splits first, then the best few with all."""
    weights, x = random_weights(spec, shape, generator), random_x(rows, shape[1], generator)
    wanted = reference(x, weights[0])
    problems: list[str] = []
    timed: dict[Config, float] = {}

    def attempt(config: Config) -> None:
        fitted = stream.fitted(config, scheme, shape[1])
        if fitted in timed:
            return
        timed[fitted] = float("inf")
        try:
            function = stream.build(scheme, fitted.whole, False, stream.row_tiles(rows), 0)
            if function.resources()["local_bytes"]:
                return
            error = relative_error(launches.by_stream(x, weights[:1], [None], scheme, fitted).start()[0], wanted)
            if error > 5e-3:
                problems.append(f"{fitted}: relative error {error:.1e}")
                return
            calls = [lambda w=w: launches.by_stream(x, [w], [None], scheme, fitted).start() for w in weights]
            timed[fitted] = seconds_cold(calls, 3)
        except (KernelError, RuntimeError) as error:
            problems.append(f"{fitted}: {str(error)[:200]}")

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for config in configs:
        fill = multiprocessors * config.min_blocks / -(-shape[0] // config.outs)
        for splits in sorted({max(round(fill), 1), max(round(fill / 2), 1)}):
            attempt(replace(config, splits=min(splits, 16)))
    for config in sorted(timed, key=lambda c: timed[c])[:4]:
        for splits in SPLITS:
            attempt(replace(config, splits=splits))
    ranking = sorted(((s, weights[0].nbytes / s / 1e9, c) for c, s in timed.items()), key=lambda r: r[0])
    if problems:
        print(f"{spec} rows {rows} {shape}: {len(problems)} problems, the first: {problems[0]}", flush=True)
    return {
        "spec": spec,
        "rows": rows,
        "shape": shape,
        "ranking": ranking[:12],
        "problems": problems[:20],
        "tried": len(timed),
    }


def reference(x: Tensor, packed: PackedWeight) -> Tensor:
    return torch.nn.functional.linear(x.float(), dequantize(packed, torch.bfloat16).float())


def print_table(results: list[dict[str, Any]]) -> None:
    print("TABLE = {")
    for found in results:
        scheme = stream.scheme(parse_format(found["spec"]), 4096)
        assert not isinstance(scheme, str)
        _, speed, config = found["ranking"][0]
        key = (tuned.kind(scheme), stream.row_tiles(found["rows"]), tuple(found["shape"]))
        print(f"    {key}: {astuple(config)},  # {speed:.0f} GB/s")
    print("}", flush=True)
