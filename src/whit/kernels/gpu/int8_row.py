"""The product of one row in int8: quantized and multiplied in one launch (int8_row.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.int8 import BYTES, HERE, Weight
from whit.kernels.gpu.int8_rows import rounded

ROW = HERE / "int8_row.cu"
STEP, THREADS = 64, 256
ASIDE = 4 * (2 * 8 * 16 + 2 * 16 * 16 + 3 * 8)  # bytes of shared memory beside codes and list
MOST_COLUMNS = 32768  # of which codes, and a list of all of them, fit beside those of a second block


@dataclass(frozen=True)
class OneRow:
    """How the work is cut; int8_row.cu explains the names."""

    ahead: int = 8
    min_blocks: int = 2

    def macros(self, half: bool, outliers: bool, columns: int) -> dict[str, int]:
        """What int8_row.cu is compiled with."""
        return BYTES | {
            "HALF": int(half), "OUTLIERS": int(outliers), "CHUNKS": -(-columns // (8 * THREADS)), "AHEAD": self.ahead,
            "MIN_BLOCKS": self.min_blocks,
        }  # fmt: skip

    def blocks(self, outs: int, processors: int) -> int:
        """As many as stay at a time, or one for each tile of 16 outs."""
        return min(-(-outs // 16), processors * self.min_blocks)


class RowParams(ctypes.Structure):
    """The argument of int8_row.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "x", "row_scale", "bias", "y")),
        ("threshold", ctypes.c_float), ("outs", ctypes.c_int), ("columns", ctypes.c_int),
    )  # fmt: skip


def fits(rows: int, columns: int) -> bool:
    """Whether the kernel runs it."""
    return rows == 1 and columns % STEP == 0 and columns <= MOST_COLUMNS


def shared_bytes(columns: int, outliers: bool) -> int:
    """Dynamic shared memory of a block."""
    return columns + ASIDE + (2 * columns if outliers else 0)


def row_params(x: Tensor, weight: Weight, y: Tensor, threshold: float) -> RowParams:
    """The kernel's argument; it borrows the tensors' memory."""
    pointers = [None if t is None else t.data_ptr() for t in (weight.codes, x, weight.row_scale, weight.bias, y)]
    return RowParams(*pointers, rounded(threshold, x.dtype), y.shape[1], x.shape[1])


def multiply_row(x: Tensor, weight: Weight, y: Tensor, threshold: float, config: OneRow) -> None:
    """Fill y (1, outs) with contiguous x (1, columns), quantized, through the weight, where `fits`.

    With a threshold its outlier columns are multiplied as floats, as `int8_rows.quantize` and `int8.multiply` do.
    """
    outliers, columns, device = threshold > 0, x.shape[1], x.device.index
    function = nvrtc.built(ROW, tuple(config.macros(x.dtype == torch.float16, outliers, columns).items()), device)
    blocks = config.blocks(y.shape[1], nvrtc.processors(device))
    shared, where = shared_bytes(columns, outliers), nvrtc.stream_on(x.device.index)
    function.launch_early((blocks, 1, 1), THREADS, shared, row_params(x, weight, y, threshold), where)
