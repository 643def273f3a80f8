"""Eight-bit activations on a Hopper GPU: python benchmarks/int8_gpu.py [--seconds 90] [--out results/int8_gpu.json]

First checks, each kind in a process of its own, so that one that hangs or faults is told and the others go on: W8A8
equals torch._int_mm and the CPU's functions bit for bit; LLM.int8() with planted outlier columns, more of them than lie
in shared memory at a time, and all columns; rows with zero points; FP8; CUDA graphs, torch.compile, and that nothing
waits for the device. Then times: cold weights (more than 400 MB of distinct ones in each CUDA graph), medians, beside
torch's bf16 product in the same run, as products are dispatched (with --cuts every cut that may be the best, too), with
the share of the limit: bytes of the weight at the memory's rate, or operations at the tensor cores', whichever takes
longer. FP8 is torch's product, its rows quantized by this package.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.activations import parse_activations
from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels import float8
from whit.kernels import int8 as reference
from whit.kernels.activated import Activation8
from whit.kernels.gpu import Gpu8, GpuFloat8, int8, int8_row, int8_thin, int8_ways, kernel8, nvrtc
from whit.kernels.gpu.int8 import Config
from whit.kernels.gpu.int8_row import OneRow
from whit.kernels.gpu.int8_thin import BESIDE, Thin
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

from gpu_harness import Budget, Kitchen, copies, seconds_cold
from harness import RESULTS, machine, markdown

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 16, 64, 256, 1024, 4096)
DEVICE = "cuda"
# What is not timed: "row", the launch for one row, "thin"; if "plain" is wrong, outliers.
DOUBTED: set[str] = set()
SHARE = 0.001  # of columns are outliers
BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12}  # NVIDIA's data sheets
OPERATIONS = 1979e12  # of int8, dense
GOALS = {
    "W8A8": {1: 1.8, 16: 1.8, 64: 1.8, 4096: 1.6},
    "LLM.int8()": {1: 1.6, 16: 1.6, 64: 1.6, 256: 1.0, 1024: 1.0, 4096: 1.4},
}
FEW = (
    Config(1, 128, 8, 2), Config(1, 128, 4, 4), Config(1, 128, 8), Config(1, 64, 12, 2), Config(1, 64, 8, 2),
    Config(1, 64, 12), Config(1, 32, 12), Config(1, 32, 17),
)  # fmt: skip
SOME = (Config(1, 128, 8), Config(2, 128, 6, 2), Config(2, 128, 6), Config(2, 256, 4), Config(1, 256, 5, 2))
MANY = (Config(2, 256, 4), Config(2, 128, 6), Config(2, 256, 4, pair=2))
ONE_ROW = (OneRow(8, 2), OneRow(4, 2), OneRow(6, 2), OneRow(4, 3), OneRow(8, 1), OneRow(3, 4))
GEOMETRIES = {  # outs and splits
    (4096, 4096): ((64, 2), (64, 4), (64, 1), (128, 4)),
    (14336, 4096): ((64, 1), (128, 2), (128, 1)),
    (4096, 14336): ((64, 2), (64, 4), (128, 4), (128, 8)),
}
LEADS = {1: (4, 10), 16: (4, 8), 64: (3, 5)}  # steps of x
LATE = (99, 8, 2, 0)
CUTS: dict[int, tuple[Config | OneRow, ...]] = {
    1: (*ONE_ROW, *FEW[:3]),
    16: FEW,
    64: FEW,
    256: SOME,
    1024: MANY,
    4096: MANY,
}


def stages_beside(outs: int, split: int, lead: int, rows: int, most: int = 14) -> int:
    """As many stages as lie in half of a multiprocessor's shared memory."""
    return max(s for s in range(1, most) if Thin(outs, s, split, lead).shared_bytes(rows) <= BESIDE)


def thin_cuts(shape: tuple[int, int], rows: int) -> list[Thin]:
    """Every geometry of a shape, in every way to begin."""
    if rows > 64 or "thin" in DOUBTED:
        return []
    some = [each for each in GEOMETRIES.get(shape, ()) if each[0] * rows < 1 << 14]
    cuts = [Thin(o, stages_beside(o, split, n, rows), split, n) for o, split in some for n in LEADS[rows]]
    return [replace(cut, late=late) for cut in cuts for late in LATE if 2 <= cut.lead <= cut.stages]


# Operands


def weight(shape: tuple[int, int], how: str, generator: torch.Generator, spec: str = "int8") -> PackedWeight:
    """Random codes as they lie in a file, prepared."""
    tensors = {"codes": torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE, generator=generator)}
    scale = torch.rand(shape[0], 1, device=DEVICE, generator=generator) * 0.01 + 0.001
    tensors |= dict.fromkeys(parse_format(spec).param_specs(*shape), scale)
    plain = PackedWeight(BITS.name, parse_format(spec), shape, tensors, activations=parse_activations(how))
    return Gpu8().prepare(plain)


def inputs(rows: int, columns: int, outliers: int, generator: torch.Generator) -> Tensor:
    """bfloat16 (rows, columns) below 6, but for so many columns that hold 20 in every seventh row."""
    x = torch.randn(rows, columns, device=DEVICE, generator=generator).clamp(-5, 5)
    which = torch.randperm(columns, device=DEVICE, generator=generator)[:outliers]
    x[::7, which] += 20
    return x.to(torch.bfloat16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


# Checks


def on_cpu(packed: PackedWeight) -> PackedWeight:
    tensors = {name: tensor.cpu() for name, tensor in packed.tensors.items()}
    return PackedWeight(packed.layout, packed.format, packed.shape, tensors, activations=packed.activations)


def compare(found: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> float:
    """Relative distance to the functions that define correct, on the CPU in float32 for what is not exact; 0: equal."""
    exact = packed.activations is not None and not packed.activations.threshold
    there = x.cpu() if exact else x.cpu().float()
    wanted = Activation8().linear(there, on_cpu(packed), None if bias is None else bias.cpu())
    found = found.cpu()
    if exact and torch.equal(found, wanted):
        return 0.0
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return float(error) if error == error else float("inf")


def check_product(
    config: Config, shape: tuple[int, int], rows: int, how: str, outliers: int
) -> tuple[str, float, float]:
    """A label, the error, and what it may be."""
    seed = generator(rows + outliers)
    packed = weight(shape, how, seed, "int8-absmax" if "outliers" in how else "int8")
    x, bias = inputs(rows, shape[1], outliers, seed), torch.randn(shape[0], device=DEVICE, generator=seed).bfloat16()
    y = torch.full((rows, shape[0]), float("nan"), dtype=x.dtype, device=DEVICE)
    kernel8.product(x, packed, bias, y, config)
    torch.cuda.synchronize()
    label = f"{how}, {rows} rows, {shape[0]}x{shape[1]}, {outliers} outliers, {config}"
    return label, compare(y, x, packed, bias), 4e-3 if outliers else 0.0


def plain_checks() -> Iterator[tuple[str, float, float]]:
    yield from rows_checks()
    for config in (
        Config(1, 64, 4),
        Config(1, 32, 3),
        Config(1, 128, 8),
        Config(2, 128, 6),
        Config(2, 256, 4),
        Config(1, 256, 5),
    ):
        yield check_product(config, (1048, 1168), 200, "int8", 0)
        yield check_product(config, (1048, 1168), 200, "int8-outliers", 21)


def rows_checks() -> Iterator[tuple[str, float, float]]:
    for rows, columns, threshold in ((1, 4096, 0.0), (64, 14336, 0.0), (1, 4096, 6.0), (300, 4112, 6.0)):
        x = inputs(rows, columns, 5 if threshold else 0, generator(rows))
        found = int8.quantize(x, threshold)
        outlier = reference.outlier_columns(x.cpu(), threshold) if threshold else torch.zeros(columns, dtype=torch.bool)
        wanted = reference.quantize_rows(torch.where(outlier, 0, x.cpu()))
        same = torch.equal(found.codes.cpu(), wanted.codes) and torch.equal(found.scale.cpu(), wanted.scale[:, 0])
        if threshold and found.listed is not None:
            same &= sorted(found.listed[1 : 1 + int(found.listed[0])].tolist()) == outlier.nonzero()[:, 0].tolist()
        yield f"rows of {rows}x{columns}, threshold {threshold}", 0.0 if same else 1.0, 0.0


def cook(wanted: Iterable[tuple[Path, dict[str, int]]]) -> None:
    """Compile these side by side, before CUDA is used."""
    kitchen = Kitchen()
    kitchen.prepare((source, macros.items()) for source, macros in wanted)
    kitchen.pool.terminate()


def row_checks() -> Iterator[tuple[str, float, float]]:
    """One row in one launch."""
    shape, every = (1048, 4160), [(c, outliers) for c in ONE_ROW[:4] for outliers in (None, 0, 4, 300)]
    cook((int8_row.ROW, c.macros(False, outliers is not None, shape[1])) for c, outliers in every)
    for config, outliers in every:
        seed = generator(1)
        packed = weight(shape, "int8" if outliers is None else "int8-outliers", seed)
        x, bias = inputs(1, shape[1], outliers or 0, seed), torch.randn(shape[0], device=DEVICE).bfloat16()
        y = torch.full((1, shape[0]), float("nan"), dtype=x.dtype, device=DEVICE)
        for _ in range(3):  # the next one begins before the last one is done
            kernel8.product(x, packed, bias, y, config)
        torch.cuda.synchronize()
        yield f"{outliers} outliers, {config}", compare(y, x, packed, bias), 0.0 if outliers is None else 4e-3


def thin_checks() -> Iterator[tuple[str, float, float]]:
    """Beside the end of the product before."""
    some = (Thin(64, 8, 2), Thin(64, 4, 1, 2, 0), Thin(128, 4, 4), Thin(256, 2, 8, 2, 4, 1), Thin(128, 3, 2, 3, 2))
    cases = ((1, None), (16, None), (33, None), (64, None), (1, 4), (16, 21), (64, 0), (64, 40))
    shape, every = (1048, 4112), [(c, *case) for c in some for case in cases]
    cook((int8_thin.THIN, c.macros(False, outliers is not None, rows)) for c, rows, outliers in every)
    for config, rows, outliers in every:
        seed = generator(rows)
        packed = weight(shape, "int8" if outliers is None else "int8-outliers", seed)
        x, bias = inputs(rows, shape[1], outliers or 0, seed), torch.randn(shape[0], device=DEVICE).bfloat16()
        y = torch.full((rows, shape[0]), float("nan"), dtype=x.dtype, device=DEVICE)
        for _ in range(3):
            kernel8.product(x, packed, bias, y, config)
        torch.cuda.synchronize()
        allowed = 0.0 if outliers is None else 4e-3
        yield f"{outliers} outliers, {rows} rows, {config}", compare(y, x, packed, bias), allowed
    for how, config, rows in itertools.product(("int8", "int8-outliers"), some, (1, 16, 64)):
        packed, x = weight((4096, 4096), how, generator(1)), inputs(rows, 4096, 4 if "out" in how else 0, generator(2))
        found, wanted = (chained(packed, x, each) for each in (config, Config(1, 128, 8)))
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        yield f"five in a row, {how}, {rows} rows, {config}", float(error), 0.0 if how == "int8" else 4e-3


def chained(packed: PackedWeight, x: Tensor, config: Thin | Config) -> Tensor:
    """Each product's rows are what the one before it made, in one graph."""
    ys, graph = [torch.full_like(x, float("nan")) for _ in range(5)], torch.cuda.CUDAGraph()
    kernel8.product(x, packed, None, ys[0], config)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for y in ys:
            kernel8.product(x, packed, None, y, config)
            x = y
    for y in ys:
        y.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return ys[-1]


def split_checks() -> Iterator[tuple[str, float, float]]:
    for config in (
        Config(1, 128, 8, 4),
        Config(1, 64, 8, 2),
        Config(1, 128, 6, 8),
        Config(2, 128, 6, 2),
        Config(1, 256, 5, 8),
    ):
        for rows in (1, 16, 64, 100):
            yield check_product(config, (1048, 4112), rows, "int8", 0)
        yield check_product(config, (1048, 4112), 64, "int8-outliers", 21)
        yield check_product(config, (1048, 4112), 1, "int8-outliers", 4)


def pair_checks() -> Iterator[tuple[str, float, float]]:
    for config in (Config(2, 128, 6, pair=2), Config(2, 256, 4, pair=2), Config(1, 64, 4, pair=2)):
        for rows in (300, 1500):
            yield check_product(config, (1048, 1168), rows, "int8", 0)
        yield check_product(config, (1048, 1168), 300, "int8-outliers", 21)
        yield check_product(config, (4096, 4096), 1024, "int8", 0)


def whole_checks() -> Iterator[tuple[str, float, float]]:
    """Through the module, as a model runs it."""
    for how in ("int8", "int8-outliers", "int8-asym", "int8-tensor"):
        for rows, outliers in ((1, 0), (16, 4), (64, 4), (256, 4), (1500, 4)):
            seed = generator(rows)
            packed = weight((2048, 2048), how, seed)
            x = inputs(rows, 2048, outliers if "outliers" in how else 0, seed)
            with no_waiting():
                found = Gpu8().linear(x, packed, None)
            error = compare(found, x, packed, None)
            yield f"{how}, {rows} rows, by dispatch", error, 1e-2 if how != "int8" else 0.0
    x, packed = inputs(32, 2048, 2048, generator(1)) + 9, weight((512, 2048), "int8-outliers", generator(2))
    yield "every column an outlier", compare(Gpu8().linear(x, packed, None), x, packed, None), 4e-3
    x = inputs(24, 2048, 0, generator(3))
    x[5, 7], x[6, 8] = float("nan"), float("inf")
    y, good = Gpu8().linear(x, weight((512, 2048), "int8", generator(4)), None), torch.ones(24, dtype=torch.bool)
    good[5:7] = False
    right = bool(y[good].isfinite().all()) and not y[~good].isfinite().any()
    yield "rows that are not finite, and only they, come out so", 0.0 if right else 1.0, 0.0


class no_waiting:
    """An error where something inside waits for the device."""

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


def graph_checks() -> Iterator[tuple[str, float, float]]:
    packed = weight((1024, 2048), "int8-outliers", generator(5), "int8-absmax")
    x = inputs(32, 2048, 3, generator(6))
    Gpu8().linear(x, packed, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(2):
            y = Gpu8().linear(y.repeat(1, 2048 // y.shape[1]), packed, None)
    for seed, outliers in ((7, 0), (8, 40)):  # how many outliers there are is found anew
        x.copy_(inputs(32, 2048, outliers, generator(seed)))
        graph.replay()
        wanted = Gpu8().linear(Gpu8().linear(x, packed, None).repeat(1, 2), packed, None)
        yield f"a CUDA graph with {outliers} outliers", 0.0 if torch.equal(y, wanted) else 1.0, 0.0
    linear = QuantizedLinear(packed, None, torch.bfloat16)
    compiled = torch.compile(lambda v: linear(torch.nn.functional.silu(v)) * 2, fullgraph=True)
    wanted = linear(torch.nn.functional.silu(x)) * 2
    with torch.inference_mode():
        error = (compiled(x).float() - wanted.float()).norm() / wanted.float().norm()
    yield "torch.compile, whole", float(error), 1e-2


def float8_checks() -> Iterator[tuple[str, float, float]]:
    for how in ("fp8", "fp8-tensor"):
        for rows in (1, 16, 300):
            seed = generator(rows)
            codes = (torch.randn(512, 1024, device=DEVICE, generator=seed) * 30).to(torch.float8_e4m3fn)
            scale = torch.rand(512, 1, device=DEVICE, generator=seed) * 0.01
            tensors = {"codes": codes.view(torch.uint8), "scale": scale}
            packed = PackedWeight(
                BITS.name, parse_format("fp8"), (512, 1024), tensors, activations=parse_activations(how)
            )
            x = inputs(rows, 1024, 3, seed)
            wanted = Activation8().linear(x.cpu(), on_cpu(packed), None).double()
            for kernel in (Activation8(), *([GpuFloat8()] if how == "fp8" else [])):
                with no_waiting():
                    found = kernel.linear(x, kernel.prepare(packed), None)
                yield f"{how}, {rows} rows, {kernel.name}", float((found.cpu() - wanted).norm() / wanted.norm()), 4e-3
        if how == "fp8":
            codes, wanted = int8.quantize(x, dtype=torch.float8_e4m3fn).codes, float8.quantize_rows(x.cpu()).codes
            same = torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))
            yield "rows as E4M3 floats", 0.0 if same else 1.0, 0.0


CHECKS: dict[str, Callable[[], Iterator[tuple[str, float, float]]]] = {
    "plain": plain_checks, "split": split_checks, "pair": pair_checks, "row": row_checks,
    "thin": thin_checks,
    "whole": whole_checks, "graphs": graph_checks, "float8": float8_checks,
}  # fmt: skip


# Times


def limit_seconds(shape: tuple[int, int], rows: int) -> float:
    """What a product takes at the memory's rate, or the tensor cores'."""
    rate = next((r for name, r in BYTES_PER_SECOND.items() if name in torch.cuda.get_device_name()), 3.35e12)
    moved = shape[0] * shape[1] + rows * (2 * shape[0] + 2 * shape[1])
    return max(moved / rate, 2 * rows * shape[0] * shape[1] / OPERATIONS)


def may_be_best(config: Config | OneRow, shape: tuple[int, int], rows: int) -> bool:
    """Whether it fits, all blocks of a tile have work, and no more clusters wait than a few turns' worth."""
    if isinstance(config, OneRow):
        return rows == 1
    blocks = config.tiles(shape[0], rows) * config.split * config.pair
    return config.split == 1 or (blocks <= 300 and config.split * 512 <= shape[1])


@contextmanager
def alone() -> Iterator[None]:
    """While nobody else has the device, where several share one and the file GPU_LOCK says whose turn it is."""
    with open(os.environ.get("GPU_LOCK", os.devnull), "w") as turn:
        if turn.name != os.devnull:
            fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def time_shape(shape: tuple[int, int], cuts: bool, budget: Budget, log: Callable[[dict[str, Any]], None]) -> None:
    seed, size = generator(1), shape[0] * shape[1]
    dense = [torch.randn(shape, device=DEVICE, generator=seed).bfloat16() for _ in range(copies(2 * size))]
    ours = [weight(shape, "int8", seed) for _ in range(copies(size))]
    for rows in ROWS:
        if budget.left > 3:
            share = 4 if rows >= 1024 else 1  # of the weights are enough, where products are long
            some = (weights[: max(len(weights) // share, 2)] for weights in (dense, ours))
            with alone():
                log(time_cell(inputs(rows, shape[1], round(SHARE * shape[1]), seed), *some, cuts))


def time_cell(x: Tensor, dense: list[Tensor], ours: list[PackedWeight], cuts: bool) -> dict[str, Any]:
    """Seconds of each way, for one shape and number of rows; and of every cut that may be the best."""
    rows, shape = len(x), tuple(dense[0].shape)
    how = parse_activations("int8-outliers")
    outlying = [PackedWeight(w.layout, w.format, w.shape, w.tensors, activations=how) for w in ours]
    cell: dict[str, Any] = {"shape": shape, "rows": rows, "limit": limit_seconds(shape, rows)}
    cell["bf16"] = seconds_cold([lambda w=w: torch.nn.functional.linear(x, w) for w in dense])
    cell["rows alone"] = seconds_cold([lambda: int8.quantize(x) for _ in range(8)])
    cell["rows alone, outliers"] = seconds_cold([lambda: int8.quantize(x, 6.0) for _ in range(8)])
    for name, each in (("W8A8", ours), ("LLM.int8()", outlying)):
        cell[name] = seconds_cold([lambda w=w: Gpu8().linear(x, w, None) for w in each])
    if cuts:
        cell["cuts"] = time_cuts(ours, x)
        cell["cuts, outliers"] = time_cuts(outlying, x, sorted(cell["cuts"], key=cell["cuts"].get)[:14])
    codes = int8.quantize(x).codes
    if rows > 16:
        signed = [w.tensors["codes"].view(torch.int8).t() for w in ours]
        cell["torch._int_mm alone"] = seconds_cold([lambda w=w: torch._int_mm(codes, w) for w in signed])
    cell["torch._scaled_mm, FP8, alone"] = time_float8(ours, x)
    cell["FP8"], cell["FP8 by torch"] = (time_whole_float8(ours, x, each) for each in (GpuFloat8(), Activation8()))
    return cell


def time_whole_float8(weights: list[PackedWeight], x: Tensor, kernel: GpuFloat8 | Activation8) -> float:
    """The same, rows quantized too."""
    how, format = parse_activations("fp8"), parse_format("fp8")
    scale = {"scale": torch.ones(weights[0].shape[0], 1, device=DEVICE)}
    codes = [w.tensors["codes"] & 0xB7 for w in weights]
    some = [
        kernel.prepare(PackedWeight(BITS.name, format, w.shape, {"codes": c} | scale, activations=how))
        for w, c in zip(weights, codes, strict=True)
    ]
    return seconds_cold([lambda w=w: kernel.linear(x, w, None) for w in some])


def timed(
    packed: PackedWeight, x: Tensor, config: Config | OneRow | Thin, how: Callable[..., None] | None = None
) -> Callable[[], object]:
    y = torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    return lambda: kernel8.product(x, packed, None, y, config)


def time_cuts(weights: list[PackedWeight], x: Tensor, among: list[str] | None = None) -> dict[str, float]:
    """Seconds of each cut."""
    found, (outs, columns) = {}, weights[0].shape
    cuts = [
        c
        for c in (*thin_cuts((outs, columns), len(x)), *CUTS[len(x)])
        if ("row" not in DOUBTED or not isinstance(c, OneRow)) and (among is None or str(c) in among)
    ]
    if "plain" in DOUBTED and weights[0].activations is not None and weights[0].activations.threshold:
        cuts = [c for c in cuts if not isinstance(c, Config)]
    for config in cuts:
        if isinstance(config, Thin) or may_be_best(config, (outs, columns), len(x)):
            try:
                found[str(config)] = seconds_cold([timed(w, x, config) for w in weights])
            except KernelError as error:
                print(f"{config}: {error}", flush=True)
    return found


def time_float8(weights: list[PackedWeight], x: Tensor) -> float | None:
    """torch's product of E4M3 codes with scales per row, of what is quantized already."""
    one, each = torch.ones(len(x), 1, device=DEVICE), torch.ones(1, weights[0].shape[0], device=DEVICE)
    codes = x.clamp(-5, 5).to(torch.float8_e4m3fn)
    rights = [(w.tensors["codes"] & 0xB7).view(torch.float8_e4m3fn).t() for w in weights]
    try:
        return seconds_cold(
            [
                lambda w=w: torch._scaled_mm(codes, w, scale_a=one, scale_b=each, out_dtype=torch.bfloat16)
                for w in rights
            ]
        )
    except RuntimeError as error:
        print(f"_scaled_mm: {str(error)[:200]}", flush=True)
        return None


def dispatched() -> list[tuple[Path, Any]]:
    """What the dispatch compiles for these shapes and rows."""
    device, wanted = torch.cuda.get_device_properties(0), []
    processors, name = device.multi_processor_count, device.name
    for (outs, columns), rows, outliers in itertools.product(SHAPES, ROWS, (False, True)):
        way = int8_ways.way(outs, columns, rows, outliers, processors, name)
        source = int8.PRODUCT if isinstance(way, Config) else int8_thin.THIN if isinstance(way, Thin) else int8_row.ROW
        last = {int8.PRODUCT: False, int8_thin.THIN: rows, int8_row.ROW: columns}[source]
        wanted.append((source, way.macros(False, outliers, last).items()))
    return wanted


def every_cut() -> list[tuple[Path, Any]]:
    """What all cuts are compiled to."""
    wanted = [
        (int8.PRODUCT, config.macros(False, outliers, False).items())
        for config in {c for each in CUTS.values() for c in each if isinstance(c, Config)}
        for outliers in (False, True)
    ]
    wanted += [
        (int8_row.ROW, c.macros(False, o, columns).items())
        for c in ONE_ROW
        for o in (False, True)
        for columns in (4096, 14336)
    ]
    wanted += [
        (int8_thin.THIN, c.macros(False, o, rows).items())
        for rows in ROWS for shape in SHAPES for c in thin_cuts(shape, rows) for o in (False, True)
    ]  # fmt: skip
    return wanted


def time_all(seconds: float, cuts: bool) -> None:
    """Prints a line of JSON per cell."""
    budget, kitchen, start = Budget(seconds), Kitchen(), time.monotonic()
    wanted = every_cut() if cuts else dispatched()
    kinds = ((False, False), (True, False), (False, True), (True, False, int8.rows_each(16, 4096)))
    wanted += [(int8.QUANTIZE, int8.quantize_macros(c, False, *kind).items()) for c in (4096, 14336) for kind in kinds]
    wanted += [(int8.MARK, int8.mark_macros(False, rows, int8.slices(rows) > 1).items()) for rows in ROWS]
    kitchen.prepare(wanted)
    kitchen.pool.terminate()
    print(f"compiled in {time.monotonic() - start:.1f} s", flush=True)
    if budget.left > 20:
        with alone():
            overlapped()
    for shape in SHAPES:
        time_shape(shape, cuts, budget, lambda cell: print("CELL " + json.dumps(cell), flush=True))
        torch.cuda.empty_cache()


def overlapped() -> None:
    """What it brings that kernels begin before the one in front of them is done."""
    weights, x = [weight((4096, 4096), "int8", generator(1)) for _ in range(24)], inputs(16, 4096, 0, generator(2))
    together = seconds_cold([timed(w, x, FEW[0]) for w in weights])
    early, nvrtc.EARLY = nvrtc.EARLY, 0  # an attribute that is ignored
    alone = seconds_cold([timed(w, x, FEW[0]) for w in weights])
    nvrtc.EARLY = early
    print("CELL " + json.dumps({"overlapped": together, "one after the other": alone}), flush=True)


# The whole


def run_part(part: str, seconds: float, cuts: bool) -> None:
    if part == "times":
        time_all(seconds, cuts)
        return
    for label, error, allowed in CHECKS[part]():
        print("CHECK " + json.dumps([part, label, error, error <= allowed]), flush=True)


def start_part(part: str, seconds: float, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--part", part, "--seconds", str(seconds), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    """What a part printed, and how it ended where that was not well."""
    try:
        text, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        return (process.communicate()[0] or "") + "\nFAILED: it took too long\n"
    return text + (f"\nFAILED: status {process.returncode}\n" if process.returncode else "")


def is_wrong(text: str) -> bool:
    """Whether a part that ran did not end well, or found something wrong."""
    found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("CHECK ")]
    return "FAILED" in text or not all(each[3] for each in found)


def table(cells: list[dict[str, Any]]) -> str:
    """Times bf16, and in brackets the share of the limit."""
    lines = []
    for cell in cells:
        if "rows" in cell:
            speeds = [
                f"{cell['bf16'] / cell[name]:.2f} ({100 * cell['limit'] / cell[name]:.0f} %)"
                for name in ("W8A8", "LLM.int8()", "FP8")
            ]
            lines.append(("{}x{}".format(*cell["shape"]), str(cell["rows"]), f"{1e6 * cell['bf16']:.1f}", *speeds))
    return markdown(("shape", "rows", "bf16, µs", "W8A8", "LLM.int8()", "FP8 W8A8"), lines)


def page(result: dict[str, Any]) -> str:
    """What is committed beside the JSON."""
    checks, cells = result["checks"], [c for c in result["cells"] if "rows" in c]
    missed = [
        f"{name} {outs}x{columns} at {rows} rows: {cell['bf16'] / cell[name]:.2f} of {goal}"
        for name, goals in GOALS.items()
        for cell in cells
        for (outs, columns), rows in [(cell["shape"], cell["rows"])]
        if (goal := goals.get(rows)) and cell["bf16"] / cell[name] < goal
    ]
    met = sum(cell["rows"] in goals for goals in GOALS.values() for cell in cells) - len(missed)
    return (
        f"{result['machine'].get('gpu')}, torch {result['machine']['torch version']}. Times bf16 (torch's product in "
        "the same run), as they are dispatched, rows quantized included; in brackets the share of what the memory's "
        f"rate or the tensor cores' allow. {sum(c[3] for c in checks)} checks of {len(checks)} passed.\n\n"
        f"{table(cells)}\n\n{met} goals met; not met: {'; '.join(missed) or 'none'}.\n"
    )


def others(out: Path) -> list[dict[str, Any]]:
    """What was kept of other devices, beside this run's JSON."""
    return [json.loads(path.read_text()) for path in sorted(out.parent.glob(f"{out.stem}_*.json"))]


def ways(cells: list[dict[str, Any]]) -> str:
    """Lines of kernels/gpu/int8_ways.py: the fastest of each cell."""
    lines = []
    for name, kind in (("int8", "cuts"), ("int8-outliers", "cuts, outliers")):
        for cell in (c for c in cells if kind in c):
            found = cell[kind]
            best = min(found, key=found.get)
            key = (name != "int8", cell["rows"], tuple(cell["shape"]))
            lines.append(f"    {key}: {best},  # {1e6 * found[best]:.1f} us, bf16 {1e6 * cell['bf16']:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--out", type=Path, default=RESULTS / "int8_gpu.json")
    parser.add_argument("--checks", default=",".join(CHECKS), help="which kinds, parted by commas")
    parser.add_argument("--cuts", action="store_true", help="time every cut that may be the best, too")
    parser.add_argument("--without", default="", help="of these cuts not the launch for one row (row), or thin")
    parser.add_argument("--ways", type=Path, help="print rows of kernels/gpu/int8_ways.py from such a JSON")
    parser.add_argument("--part", choices=[*CHECKS, "times"])
    args = parser.parse_args()
    if args.ways:
        print(ways(json.loads(args.ways.read_text())["cells"]))
        return
    if args.part:
        DOUBTED.update(args.without.split(","))
        run_part(args.part, args.seconds, args.cuts)
        return
    budget = Budget(args.seconds)
    running = {part: start_part(part, 40) for part in args.checks.split(",") if part}
    texts = {part: finished(process, min(budget.left, 120)) for part, process in running.items()}
    print(f"checked after {args.seconds - budget.left:.0f} s", flush=True)
    wrong = [part for part in ("row", "plain") if is_wrong(texts.get(part, ""))]
    wrong += ["thin"] if "FAILED" in texts.get("thin", "") else []  # wrong times tell something
    options = ["--without", ",".join([args.without, *wrong]), *(["--cuts"] if args.cuts else [])]
    times = start_part("times", budget.left - 8, *options)
    texts["times"] = finished(times, budget.left - 1)
    lines = [line for text in texts.values() for line in text.splitlines()]
    checks = [json.loads(line[6:]) for line in lines if line.startswith("CHECK ")]
    cells = [json.loads(line[5:]) for line in lines if line.startswith("CELL ")]
    other = {
        part: [t for t in text.splitlines() if not t.startswith(("CHECK ", "CELL "))] for part, text in texts.items()
    }
    failed = [c for c in checks if not c[3]]
    result = {"machine": machine(), "checks": checks, "cells": cells, "said": {k: v[-30:] for k, v in other.items()}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join(map(page, [result, *others(args.out)])))
    for part, said in other.items():
        print(f"--- {part}", *said[-25:], sep="\n")
    print(f"{len(checks) - len(failed)} checks of {len(checks)} passed", *failed, sep="\n")
    print(table(cells))
    for cell in cells:
        print(json.dumps(cell))


if __name__ == "__main__":
    main()
