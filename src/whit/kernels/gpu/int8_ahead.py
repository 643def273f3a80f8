"""Products of many rows in int8: the first rows are quantized, the others beside the products (int8_beside.cu).

Products leave memory idle, and quantizing rows is nothing but memory: so the one happens under the other.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from whit.kernels.gpu import int8
from whit.kernels.gpu.int8 import BYTES, HERE, Config, Rows, Weight

BESIDE = HERE / "int8_beside.cu"
THREADS, SHARED = 128, 32
TILES_FIRST = 8  # of rows, about as many as are multiplied at a time; GROUP in int8_product.cu


class BesideParams(ctypes.Structure):
    """The argument of int8_beside.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "marks", "codes", "scale", "offset", "done")),
        *((name, ctypes.c_int) for name in ("first", "rows", "columns")),
    )  # fmt: skip


def beside_macros(half: bool, outliers: bool, config: Config) -> dict[str, int]:
    """What int8_beside.cu is compiled with."""
    return BYTES | {"HALF": int(half), "OUTLIERS": int(outliers), "TILE": config.rows}


def rows_first(rows: int, config: Config) -> int:
    """Rows that are quantized before the products begin."""
    return min(rows, TILES_FIRST * config.rows)


def counts_for(x: Tensor, config: Config) -> Tensor:
    """Room for counts of the rows of each tile; int8_quantize.cu makes zeros of them."""
    return torch.empty(-(-len(x) // config.rows), dtype=torch.int32, device=x.device)


def first_params(
    x: Tensor, rows: Rows, marks: Tensor | None, threshold: float, done: Tensor, config: Config
) -> int8.QuantizeParams:
    """The argument for the first rows; it borrows the tensors' memory."""
    params = int8.quantize_params(x, rows, marks, threshold)
    params.rows, params.done, params.tiles = rows_first(len(x), config), done.data_ptr(), len(done)
    return params


def beside_params(x: Tensor, rows: Rows, marks: Tensor | None, done: Tensor, config: Config) -> BesideParams:
    """The argument for the others; it borrows the tensors' memory."""
    tensors = (x, marks, rows.codes, rows.scale, rows.offset, done)
    return BesideParams(*(None if t is None else t.data_ptr() for t in tensors), rows_first(len(x), config), *x.shape)


def awaiting(params: int8.ProductParams, done: Tensor, rows: int, config: Config) -> int8.ProductParams:
    """A product's argument that says which rows it is to wait for."""
    params.done, params.made = done.data_ptr(), rows_first(rows, config)
    return params


def multiply_ahead(x: Tensor, weight: Weight, y: Tensor, threshold: float, config: Config) -> None:
    """Fill y (rows, outs) with contiguous x (rows, columns), quantized by row, through the weight.

    With a threshold its outlier columns are multiplied as floats, as `int8.quantize` and `int8.multiply` do.
    """
    half, outliers, device = x.dtype == torch.float16, threshold > 0, x.device
    rows, done = int8.empty_rows(x, outliers), counts_for(x, config)
    marks = int8.marked(x, threshold) if outliers else None
    macros = int8.quantize_macros(x.shape[1], half, outliers)
    int8.fill_rows(first_params(x, rows, marks, threshold, done, config), macros, device)
    function = int8.build(BESIDE, tuple(beside_macros(half, outliers, config).items()), device.index)
    blocks, where = torch.cuda.get_device_properties(device).multi_processor_count, torch.cuda.current_stream(device)
    params = beside_params(x, rows, marks, done, config)
    function.launch_early((blocks, 1, 1), THREADS, SHARED, params, where.cuda_stream)
    int8.fill(awaiting(int8.product_params(rows, weight, y, config), done, len(x), config), y, config, outliers)
