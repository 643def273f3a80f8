"""NVIDIA GPU kernels: checked, tuned and timed, each in a bounded time.

    python benchmarks/gpu_kernels.py --check --tune --time --budget-seconds 240 --out FOLDER

--check compares every kernel with float64; --tune and --tune-tiled search configurations and print the tables to be
committed, and the process goes on with the latter;
--time measures the public path over distinct weights (more than 400 MB, so that the L2 cache is cold) in one CUDA graph
beside torch's bf16 product and torch's own int4 kernel. Each writes FOLDER/gpu_<part>.json as soon as it is done.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.formats import parse_format
from whit.kernels import Gpu, dequantize
from whit.kernels.gpu import launches, stream, tiled, tuned, ways
from whit.tensor import PackedWeight

from gpu_check import check
from gpu_harness import Budget, Kitchen, copies, random_weights, random_x, seconds_cold
from gpu_tune import SHAPES, tune
from gpu_tune_tiled import tune_tiled
from harness import machine, markdown

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
SPECS = ("int4-g128", "nf4", "nf4-dq", "int8", "int3-g128", "int2-g64", "int4-g64-asym", "int1-g128")
MORE_ROWS = (1, 16, 64, 256)  # for all but the first two
FEWEST_TILED = 16


def ceilings(generator: torch.Generator) -> dict[str, float]:
    """What the device can do: bytes per second read, and copied (read and written); operations per second in bf16."""
    data = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").view(torch.float32).normal_(generator=generator)
    target, halves = torch.empty_like(data), data.view(2, -1)
    sums = torch.empty(2, device="cuda")
    a = random_x(8192, 8192, generator)
    return {
        "read": data.nbytes / seconds_cold([lambda: torch.sum(halves, 1, out=sums)]),
        "copy": 2 * data.nbytes / seconds_cold([lambda: target.copy_(data)]),
        "matmul": 2 * 8192**3 / seconds_cold([lambda: a @ a]),
    }


def plain_seconds(shape: tuple[int, int], rows: Sequence[int], generator: torch.Generator) -> dict[int, float]:
    """torch's bf16 product, by rows."""
    weights = [random_x(*shape, generator) for _ in range(copies(2 * shape[0] * shape[1]))]
    found = {}
    for n in rows:
        x = random_x(n, shape[1], generator)
        found[n] = seconds_cold([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights])
    return found


def tinygemm_seconds(shape: tuple[int, int], rows: Sequence[int], generator: torch.Generator) -> dict[int, float]:
    """torch's int4 kernel with groups of 128."""
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device="cuda", generator=generator)
    first = torch._convert_weight_to_int4pack(codes, 8)
    scales = random_x(shape[1] // 128 * shape[0], 2, generator).reshape(shape[1] // 128, shape[0], 2).contiguous()
    weights = [first.clone() for _ in range(copies(codes.nbytes))]
    found = {}
    for n in rows:
        x = random_x(n, shape[1], generator)
        found[n] = seconds_cold([lambda w=w, x=x: torch._weight_int4pack_mm(x, w, 128, scales) for w in weights])
    return found


def guarded(name: str, measure: Callable[[], dict[int, float]], failures: list[str]) -> dict[int, float]:
    try:
        return measure()
    except Exception as error:
        failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        print("FAIL", failures[-1], flush=True)
        return {}


def our_seconds(
    spec: str, shape: tuple[int, int], rows: Sequence[int], generator: torch.Generator
) -> tuple[dict[str, dict[int, float]], int]:
    """The public path by rows, each way on its own, and dequantizing alone (under 0); bytes of a weight."""
    weights = random_weights(spec, shape, generator)
    found: dict[str, dict[int, float]] = {name: {} for name in ("whit", "whit invariant", "whit tiled", "dequantize")}
    for n in rows:
        x = random_x(n, shape[1], generator)
        found["whit"][n] = seconds_cold(calls(Gpu(), x, weights))
        if n in (1, 16, 64) and spec in SPECS[:2]:
            found["whit invariant"][n] = seconds_cold(calls(Gpu(invariant=True), x, weights))
        if n >= FEWEST_TILED:
            found["whit tiled"][n] = seconds_cold([lambda w=w, x=x: through_tiles(x, w) for w in weights])
    found["dequantize"][0] = seconds_cold([lambda w=w: dequantize(w, torch.bfloat16) for w in weights])
    return found, weights[0].nbytes


def through_tiles(x: Tensor, packed: PackedWeight) -> Tensor:
    scheme = ways.scheme_of(packed)
    config = tuned.best_tiled(scheme, (packed.shape[0], packed.shape[1]), x.shape[0], launches.device_of(x))
    return launches.multiply_tiled(x, packed, None, scheme, tiled.fitted(config, scheme, packed.shape[1]))


def calls(kernel: Gpu, x: Tensor, weights: Sequence[Any]) -> list[Callable[[], Tensor]]:
    return [lambda w=w: kernel.linear(x, w, None) for w in weights]


def prepare(kitchen: Kitchen, formats: Sequence[str]) -> None:
    """Compile ahead what the timed path will ask for."""
    device = torch.cuda.get_device_properties(0)
    where = (device.major, device.multi_processor_count)
    streamed, tiles = [], []
    for spec, shape in itertools.product(formats, SHAPES):
        scheme = stream.scheme(parse_format(spec), shape[1])
        assert not isinstance(scheme, str)
        for n in ROWS:
            if n <= 64:
                configs = {tuned.best(scheme, shape, n, where, invariant) for invariant in (False, True)}
                streamed += [(scheme, config.whole, False, n) for config in configs]
            if n >= FEWEST_TILED:
                tiles.append((scheme, tuned.best_tiled(scheme, shape, n, where).whole, False, device.major == 9))
    kitchen.prepare_streams(streamed)
    kitchen.prepare_tiled(tiles)


def measure(kitchen: Kitchen, budget: Budget, generator: torch.Generator, formats: Sequence[str]) -> dict[str, Any]:
    """Everything timed, in rows of one table."""
    limits, failures = ceilings(generator), []
    print({name: f"{value / 1e12:.2f} T" for name, value in limits.items()}, flush=True)
    prepare(kitchen, formats)
    entries: list[dict[str, Any]] = []
    for shape in SHAPES:
        plain = plain_seconds(shape, ROWS, generator)
        everyone: dict[tuple[str, str], tuple[dict[int, float], int]] = {}
        everyone["torch bf16", ""] = plain, 2 * shape[0] * shape[1]
        peer = guarded("tinygemm", lambda shape=shape: tinygemm_seconds(shape, ROWS[:6], generator), failures)
        everyone["torch tinygemm", "int4-g128"] = (peer, shape[0] * shape[1] * 33 // 64)
        for spec in formats:
            if budget.left < 3:
                failures.append(f"{spec} {shape}: no time left")
                continue
            rows = ROWS if spec in SPECS[:2] else MORE_ROWS
            try:
                ours, nbytes = our_seconds(spec, shape, rows, generator)
            except Exception as error:
                failures.append(f"{spec} {shape}: {type(error).__name__}: {str(error)[:300]}")
                print("FAIL", failures[-1], flush=True)
                continue
            everyone |= {(name, spec): (times, nbytes) for name, times in ours.items()}
        for (name, spec), (times, nbytes) in everyone.items():
            named = {"kernel": name, "format": spec, "shape": list(shape), "dtype": "bfloat16"}
            for n, seconds in times.items():
                moved = nbytes + (0 if n else 2 * shape[0] * shape[1])  # dequantizing (rows 0) writes what it makes
                ratio = plain[n] / seconds if n else None
                share = moved / seconds / limits["read" if n else "copy"]
                measured = {"rows": n, "seconds": seconds, "bytes": moved}
                entries.append(named | measured | {"ratio_to_bf16": ratio, "share_of_limit": share})
        print(table(entries, shape), flush=True)
    return {"limits": limits, "rows": entries, "failures": failures}


def table(entries: Sequence[dict[str, Any]], shape: tuple[int, int]) -> str:
    """Ratios to bf16 by rows for one shape; for bf16 microseconds; GB/s of weight bytes at one row."""
    header = [f"{shape[0]}x{shape[1]}", *(f"rows {n}" for n in ROWS), "GB/s"]
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for e in entries:
        if e["shape"] == list(shape):
            lines.setdefault(f"{e['kernel']} {e['format']}", {})[e["rows"]] = e
    body = []
    for name, by_rows in lines.items():
        if not by_rows:
            continue
        first = by_rows.get(1) or by_rows.get(0)
        plain = name.startswith("torch bf16")
        cells = []
        for e in (by_rows.get(n) for n in ROWS):
            shown = "" if e is None else f"({e['seconds'] * 1e6:.1f})" if plain else f"{e['ratio_to_bf16']:.2f}"
            cells.append(shown)
        speed = f"{first['bytes'] / first['seconds'] / 1e9:.0f} ({first['share_of_limit']:.0%})" if first else ""
        body.append([name, *cells, speed])
    return markdown(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="?", const="all", choices=("all", "tiled"))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tune-tiled", type=float, metavar="SECONDS")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--formats", nargs="+", default=SPECS)
    parser.add_argument("--budget-seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    given = parser.parse_args()
    kitchen = Kitchen()
    budget = Budget(given.budget_seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if given.check:
        parts["check"] = lambda: check(kitchen, budget, given.check)
    if given.tune:
        parts["tune"] = lambda: tune(kitchen, budget, generator)
    if given.tune_tiled:
        parts["tune_tiled"] = lambda: tune_tiled(kitchen, Budget(given.tune_tiled), generator)
    if given.time:
        parts["time"] = lambda: measure(kitchen, budget, generator, given.formats)
    for name, run in parts.items():
        result = {"machine": machine(), **run()}
        (given.out / f"gpu_{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        if name == "time":
            text = "\n\n".join(table(result["rows"], shape) for shape in SHAPES)
            (given.out / "gpu_time.md").write_text(text + "\n")
        print(f"{name} done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
