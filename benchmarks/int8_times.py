"""What int8_gpu.py times: products as they are dispatched, and, asked for, every cut that may be the best."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.activations import parse_activations
from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels.activated import Activation8
from whit.kernels.gpu import Gpu8, GpuFloat8, int8, int8_row, int8_rows, int8_thin, int8_ways, kernel8, nvrtc
from whit.kernels.gpu.int8 import Config
from whit.kernels.gpu.int8_row import OneRow
from whit.kernels.gpu.int8_thin import BESIDE, Thin
from whit.layouts import BITS
from whit.tensor import PackedWeight

from gpu_harness import Budget, Kitchen, copies, seconds_cold
from int8_checks import ONE_ROW
from int8_operands import DEVICE, generator, inputs, weight

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 16, 64, 256, 1024, 4096)
SHARE = 0.001  # of columns are outliers
# What is not timed: "row", the launch for one row, "thin"; if "plain" is wrong, outliers.
DOUBTED: set[str] = set()
BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12}  # NVIDIA's data sheets
OPERATIONS = 1979e12  # of int8, dense
FEW = (
    Config(1, 128, 8, 2), Config(1, 128, 4, 4), Config(1, 128, 8), Config(1, 64, 12, 2), Config(1, 64, 8, 2),
    Config(1, 64, 12), Config(1, 32, 12), Config(1, 32, 17),
)  # fmt: skip
SOME = (Config(1, 128, 8), Config(2, 128, 6, 2), Config(2, 128, 6), Config(2, 256, 4), Config(1, 256, 5, 2))
MANY = (Config(2, 256, 4), Config(2, 128, 6), Config(2, 256, 4, pair=2))
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
    cell["rows alone"] = seconds_cold([lambda: int8_rows.quantize(x) for _ in range(8)])
    cell["rows alone, outliers"] = seconds_cold([lambda: int8_rows.quantize(x, 6.0) for _ in range(8)])
    for name, each in (("W8A8", ours), ("LLM.int8()", outlying)):
        cell[name] = seconds_cold([lambda w=w: Gpu8().linear(x, w, None) for w in each])
    if cuts:
        cell["cuts"] = time_cuts(ours, x)
        cell["cuts, outliers"] = time_cuts(outlying, x, sorted(cell["cuts"], key=cell["cuts"].get)[:14])
    codes = int8_rows.quantize(x).codes
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
    some = [
        torch.empty(rows, columns, dtype=torch.bfloat16, device="meta") for rows in ROWS for columns in (4096, 14336)
    ]
    for x, kind in itertools.product(some, ((False, False), (True, False), (False, True))):
        wanted += [(source, macros.items()) for source, macros in int8_rows.compiled(x, *kind)]
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
