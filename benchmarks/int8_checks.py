"""What int8_gpu.py checks: products and rows against the functions that define correct, on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from whit.activations import parse_activations
from whit.formats import parse_format
from whit.kernels import float8
from whit.kernels import int8 as reference
from whit.kernels.activated import Activation8
from whit.kernels.gpu import Gpu8, GpuFloat8, int8_row, int8_rows, int8_thin, kernel8
from whit.kernels.gpu.int8 import Config
from whit.kernels.gpu.int8_row import OneRow
from whit.kernels.gpu.int8_thin import Thin
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

from gpu_harness import Kitchen
from int8_operands import DEVICE, generator, inputs, weight

ONE_ROW = (OneRow(8, 2), OneRow(4, 2), OneRow(6, 2), OneRow(4, 3), OneRow(8, 1), OneRow(3, 4))


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
        found = int8_rows.quantize(x, threshold)
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
            codes, wanted = int8_rows.quantize(x, dtype=torch.float8_e4m3fn).codes, float8.quantize_rows(x.cpu()).codes
            same = torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))
            yield "rows as E4M3 floats", 0.0 if same else 1.0, 0.0


CHECKS: dict[str, Callable[[], Iterator[tuple[str, float, float]]]] = {
    "plain": plain_checks, "split": split_checks, "pair": pair_checks, "row": row_checks,
    "thin": thin_checks,
    "whole": whole_checks, "graphs": graph_checks, "float8": float8_checks,
}  # fmt: skip
