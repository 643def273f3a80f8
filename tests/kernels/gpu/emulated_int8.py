"""The kernels of int8 activations compiled for the CPU: clusters of blocks, and Hopper's instructions as loops."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import int8, int8_row, int8_rows, int8_thin
from whit.kernels.gpu.int8 import Config, Rows, Weight
from whit.kernels.gpu.int8_row import OneRow
from whit.kernels.gpu.int8_thin import Thin

import emulated

HEADERS = ("emulate", "emulate_cluster", "emulate_int8")
BLOCKS = 'extern "C" void run(const Params *p, int x, int y) {{ run_grid({{x, y, 1}}, THREADS, [&] {{ {}(*p); }}); }}'
CLUSTERS = (
    'extern "C" void run(const Params *p, int x, int y) {{ run_clusters(x, THREADS, CLUSTER, [&] {{ {}(*p); }}); }}'
)


@lru_cache
def library(kernel: Path, macros: tuple[tuple[str, int], ...], driver: str) -> ctypes.CDLL:
    setup = "gatherings.assign(64, Gathering{}), "
    body = driver.format(kernel.stem).replace("run_grid", f"{setup}run_grid")
    return emulated.compiled(HEADERS, kernel, body, macros)


def quantize(x: Tensor, threshold: float = 0.0, dtype: torch.dtype = torch.int8) -> Rows:
    """As `int8_rows.quantize`."""
    half, marks, rows = x.dtype == torch.float16, None, int8_rows.empty_rows(x, threshold > 0, dtype)
    each = int8_rows.rows_each(*x.shape) if threshold > 0 else 0
    if threshold > 0 and len(x) > 1 and not each:
        marks, joined = int8_rows.marks_for(x)
        grid, argument = int8_rows.mark_launch(x, marks, threshold)
        kernel = library(int8_rows.MARK, tuple(int8_rows.mark_macros(half, len(x), joined).items()), BLOCKS)
        kernel.run(ctypes.byref(argument), *grid[:2])
    macros = int8_rows.quantize_macros(x.shape[1], half, threshold > 0, dtype == torch.float8_e4m3fn, each)
    params = int8_rows.quantize_params(x, rows, marks, threshold)
    driver, blocks = (CLUSTERS, int8_rows.TOGETHER) if each else (BLOCKS, min(len(x), 3) + (marks is not None))
    library(int8_rows.QUANTIZE, tuple(macros.items()), driver).run(ctypes.byref(params), blocks, 1)
    return rows


def multiply(rows: Rows, weight: Weight, dtype: torch.dtype, config: Config, processors: int = 4) -> Tensor:
    """As `int8.multiply`, on so many multiprocessors."""
    y = torch.full((len(rows.codes), len(weight.codes)), float("nan"), dtype=dtype)
    params = int8.product_params(rows, weight, y, config, emulated.map_of)
    macros = config.macros(dtype == torch.float16, rows.listed is not None, rows.zero is not None)
    grid = config.grid(y.shape[1], len(y), processors)
    library(int8.PRODUCT, tuple(macros.items()), CLUSTERS).run(ctypes.byref(params), *grid[:2])
    return y


def multiply_row(x: Tensor, weight: Weight, threshold: float, config: OneRow, processors: int) -> Tensor:
    """As `int8_row.multiply_row`."""
    y, outliers = torch.full((1, len(weight.codes)), float("nan"), dtype=x.dtype), threshold > 0
    macros = config.macros(x.dtype == torch.float16, outliers, x.shape[1])
    kernel = library(int8_row.ROW, tuple(macros.items()), BLOCKS)
    params = int8_row.row_params(x, weight, y, threshold)
    kernel.run(ctypes.byref(params), config.blocks(y.shape[1], processors), 1)
    return y


def multiply_thin(rows: Rows, weight: Weight, dtype: torch.dtype, config: Thin) -> Tensor:
    """As `int8_thin.multiply_thin`."""
    y = torch.full((len(rows.codes), len(weight.codes)), float("nan"), dtype=dtype)
    params = int8_thin.thin_params(rows, weight, y, config, emulated.map_of)
    macros = config.macros(dtype == torch.float16, rows.listed is not None, len(y))
    grid = config.grid(y.shape[1])
    library(int8_thin.THIN, tuple(macros.items()), CLUSTERS).run(ctypes.byref(params), *grid[:2])
    return y
