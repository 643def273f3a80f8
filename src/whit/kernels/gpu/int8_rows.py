"""Rows as int8 codes on Hopper: int8_quantize.cu says how; int8_mark.cu finds outlier columns of several rows."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.int8 import BYTES, HERE, Rows

MARK, QUANTIZE = HERE / "int8_mark.cu", HERE / "int8_quantize.cu"
MARK_THREADS = 256
MARK_WIDTHS = ((16, 16), (64, 8), (256, 4))  # up to so many rows, lanes side by side in one row; beyond, a warp
SLICES, SLICE = 64, 64  # of more rows that blocks mark: how many at most, and of how many rows at least
CHUNKS, LARGEST_BLOCK = 8, 1024  # of eight columns that a thread of int8_quantize.cu holds, and its threads, at most
TOGETHER, MOST_TOGETHER = 8, 256  # blocks that hold all rows and mark their columns themselves, and their threads
MOST_COLUMNS = 8 * CHUNKS * LARGEST_BLOCK  # and sums of weights from 0 to 255 stay within 32 bits up to 65,793


class MarkParams(ctypes.Structure):
    """The argument of int8_mark.cu, field by field."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("marks", ctypes.c_void_p), ("threshold", ctypes.c_float), ("rows", ctypes.c_int),
        ("columns", ctypes.c_int), ("slice", ctypes.c_int),
    )  # fmt: skip


class QuantizeParams(ctypes.Structure):
    """The argument of int8_quantize.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "marks", "codes", "scale", "offset", "listed")),
        ("threshold", ctypes.c_float), *((name, ctypes.c_int) for name in ("rows", "columns")),
    )  # fmt: skip


def slices(rows: int) -> int:
    """Slices of rows that are marked by blocks of their own; none of them empty."""
    if rows <= MARK_WIDTHS[-1][0]:
        return 1
    size = max(SLICE, -(-rows // SLICES))
    return -(-rows // size)


def mark_width(rows: int) -> int:
    """Lanes that read neighbouring columns of a row, eight each: few for few rows, which makes many blocks."""
    return next((width for most, width in MARK_WIDTHS if rows <= most), 32)


def mark_launch(x: Tensor, marks: Tensor, threshold: float) -> tuple[nvrtc.Dims, MarkParams]:
    """Blocks of int8_mark.cu, and its argument, which borrows the tensors' memory; `marks`: a bit for each column."""
    count = slices(len(x))
    params = MarkParams(x.data_ptr(), marks.data_ptr(), rounded(threshold, x.dtype), *x.shape, -(-len(x) // count))
    return (-(-x.shape[1] // (8 * mark_width(len(x)))), count, 1), params


def marks_for(x: Tensor) -> tuple[Tensor, bool]:
    """Room for marks, and whether slices are joined in it: zeros then."""
    joined = slices(len(x)) > 1
    empty = torch.zeros if joined else torch.empty
    return empty(4 * -(-x.shape[1] // 32), dtype=torch.uint8, device=x.device), joined


def quantize_macros(columns: int, half: bool, outliers: bool, float8: bool = False, each: int = 0) -> dict[str, int]:
    """What int8_quantize.cu is compiled with: four chunks per thread where the block is not too large for that.

    `each`: rows of each of the blocks that mark outliers themselves, or 0.
    """
    chunks, most = -(-columns // 8), MOST_TOGETHER if each else LARGEST_BLOCK
    threads = next((t for t in (128, 256, 512) if max(each, 1) * -(-chunks // t) <= 4), most)
    sizes = {"THREADS": threads, "CHUNKS": -(-chunks // threads), "CLUSTER": TOGETHER if each else 1, "EACH": each}
    return BYTES | {"HALF": int(half), "OUTLIERS": int(outliers), "FLOAT8": int(float8)} | sizes


def rows_each(rows: int, columns: int) -> int:
    """Rows of each of the blocks that mark columns and quantize in one launch; 0 where they are not held by these."""
    each = -(-rows // TOGETHER)
    return each if rows > 1 and each * -(-columns // (8 * MOST_TOGETHER)) <= CHUNKS // 2 else 0


def quantize_bytes(macros: dict[str, int]) -> int:
    """Dynamic shared memory of a block of int8_quantize.cu."""
    warps, each = macros["THREADS"] // 32, macros["EACH"]
    return 8 + 4 * warps * (2 * each + 2) + macros["THREADS"] * macros["CHUNKS"] if each else 3 * 4 * warps


def quantize_params(x: Tensor, rows: Rows, marks: Tensor | None, threshold: float) -> QuantizeParams:
    """The kernel's argument; it borrows the tensors' memory."""
    tensors = (x, marks, rows.codes, rows.scale, rows.offset, rows.listed)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    return QuantizeParams(*pointers, rounded(threshold, x.dtype), *x.shape)


def empty_rows(x: Tensor, outliers: bool, dtype: torch.dtype = torch.int8) -> Rows:
    """Room for what int8_quantize.cu makes of x (rows, columns)."""
    (rows, columns), device = x.shape, x.device
    return Rows(
        torch.empty(rows, columns, dtype=dtype, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        listed=torch.empty(1 + columns, dtype=torch.int32, device=device) if outliers else None,
        floats=x if outliers else None,
    )


def marked(x: Tensor, threshold: float) -> Tensor:
    """A bit for each column of x (rows, columns) in which some |x| reaches the threshold."""
    (marks, joined), where = marks_for(x), nvrtc.stream_on(x.device.index)
    grid, params = mark_launch(x, marks, threshold)
    macros = mark_macros(x.dtype == torch.float16, len(x), joined)
    function = nvrtc.built(MARK, tuple(macros.items()), x.device.index)
    function.launch_early(grid, MARK_THREADS, MARK_THREADS, params, where)
    return marks


def fill_rows(params: QuantizeParams, macros: dict[str, int], device: torch.device) -> None:
    """Launch int8_quantize.cu."""
    function = nvrtc.built(QUANTIZE, tuple(macros.items()), device.index)
    where = nvrtc.stream_on(device.index)
    most = 16 * nvrtc.processors(device.index)
    blocks = macros["CLUSTER"] if macros["EACH"] else min(params.rows, most) + bool(params.marks)
    function.launch_early((blocks, 1, 1), macros["THREADS"], quantize_bytes(macros), params, where, macros["CLUSTER"])


def quantize(x: Tensor, threshold: float = 0.0, dtype: torch.dtype = torch.int8) -> Rows:
    """Contiguous x (rows, columns) by a scale per row; with a threshold without its outlier columns, which are listed.

    Equals `quantize_rows` of `kernels.int8`, or, for float8_e4m3fn, of `kernels.float8` bit for bit (where `offset` is
    of no meaning). Columns are a multiple of 16, and at most MOST_COLUMNS.
    """
    rows, each = empty_rows(x, threshold > 0, dtype), rows_each(*x.shape) if threshold > 0 else 0
    marks = marked(x, threshold) if threshold > 0 and len(x) > 1 and not each else None
    half, float8 = x.dtype == torch.float16, dtype == torch.float8_e4m3fn
    macros = quantize_macros(x.shape[1], half, threshold > 0, float8, each)
    fill_rows(quantize_params(x, rows, marks, threshold), macros, x.device)
    return rows


def compiled(x: Tensor, outliers: bool, float8: bool) -> list[tuple[Path, dict[str, int]]]:
    """The sources, and their macros, that `quantize` builds for x (rows, columns)."""
    (rows, columns), half = x.shape, x.dtype == torch.float16
    each = rows_each(rows, columns) if outliers else 0
    marks = [(MARK, mark_macros(half, rows, slices(rows) > 1))] if outliers and rows > 1 and not each else []
    return [*marks, (QUANTIZE, quantize_macros(columns, half, outliers, float8, each))]


def mark_macros(half: bool, rows: int, joined: bool) -> dict[str, int]:
    """What int8_mark.cu is compiled with."""
    return BYTES | {"HALF": int(half), "JOINED": int(joined), "WIDTH": mark_width(rows)}


@lru_cache(maxsize=64)
def rounded(threshold: float, dtype: torch.dtype) -> float:
    """A threshold as torch compares it with floats of that type."""
    return torch.tensor(threshold, dtype=dtype).item()
