"""Products of up to 64 rows in int8 on Hopper, quantized and multiplied in one launch (int8_few.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.int8 import BYTES, HERE, LARGEST_SHARED, STEP, Mapped, Weight, build, rounded, tiles_of

FEW = HERE / "int8_few.cu"
MOST_FEW = 64  # rows


@dataclass(frozen=True)
class Few:
    """How the work is cut for up to 64 rows; int8_few.cu explains the names."""

    outs: int = 128
    stages: int = 4
    split: int = 4
    ahead: int = 0
    blocks: int = 1

    threads = 288

    def grid(self, outs: int) -> nvrtc.Dims:
        """A cluster per tile."""
        return -(-outs // self.outs) * self.split, 1, 1

    def shared_bytes(self, columns: int, rows: int, outliers: bool = True) -> int:
        """Dynamic shared memory of a block: stages of the weight, later sums; all codes of its columns; the rest."""
        room, share = room_for(rows), self.share(columns)
        laid = 4 * room * (self.outs + 8) * (2 if outliers and self.is_beside(columns) else 1)
        stages = -(-max(self.stages * self.outs * STEP, laid) // 1024) * 1024
        aside = 4 * (2 * self.outs + 4 * room + 1)
        return 1024 + stages + (share * room + 64 - room) * STEP + 16 * (self.stages + 1) + 16 * share + aside

    def fits(self, columns: int, rows: int) -> bool:
        """Whether its blocks' shared memory is there, beside each other."""
        return self.shared_bytes(columns, rows) <= (LARGEST_SHARED if self.blocks == 1 else LARGEST_SHARED // 2)

    def is_beside(self, columns: int) -> bool:
        """Whether sums of outliers have no room in place of x."""
        return self.share(columns) * STEP < 4 * (self.outs + 8)

    def share(self, columns: int) -> int:
        """Steps of a block."""
        steps = -(-columns // STEP)
        return -(-steps // self.split)

    def macros(self, half: bool, outliers: bool, columns: int, rows: int) -> dict[str, int]:
        """What int8_few.cu is compiled with."""
        return BYTES | {
            "HALF": int(half), "XR": room_for(rows), "BN": self.outs, "STAGES": self.stages, "SPLITS": self.split,
            "AHEAD": self.ahead, "BLOCKS": self.blocks, "BESIDE": int(self.is_beside(columns)),
            "OUTLIERS": int(outliers), "TURNS": -(-self.share(columns) * STEP // 1024),
        }  # fmt: skip


def room_for(rows: int) -> int:
    """Rows for which int8_few.cu makes room."""
    return next(room for room in (8, 16, 32, MOST_FEW) if rows <= room)


class FewParams(ctypes.Structure):
    """The argument of int8_few.cu, field by field."""

    _fields_ = (
        ("weight_map", ctypes.c_uint64 * 16),
        *((name, ctypes.c_void_p) for name in ("codes", "x", "row_scale", "bias", "y")),
        ("threshold", ctypes.c_float), *((name, ctypes.c_int) for name in ("outs", "columns", "rows")),
        ("rest", ctypes.c_int * 2),  # the map makes it a multiple of 64 bytes
    )  # fmt: skip


def few_params(
    x: Tensor, weight: Weight, y: Tensor, threshold: float, config: Few, mapped: Mapped | None = None
) -> FewParams:
    """The kernel's argument; it borrows the tensors' memory."""
    (rows, columns), outs = x.shape, y.shape[1]
    tiles = (mapped or tiles_of)(weight.codes.data_ptr(), outs, columns, config.outs)
    tensors = (weight.codes, x, weight.row_scale, weight.bias, y)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    return FewParams(tiles, *pointers, rounded(threshold, x.dtype), outs, columns, rows)


def multiply_few(x: Tensor, weight: Weight, y: Tensor, threshold: float, config: Few) -> None:
    """Fill y (rows, outs) with contiguous x (rows, columns), quantized by row, through the weight: up to 64 rows.

    With a threshold its outlier columns are multiplied as floats, as `quantize` and `multiply` do.
    """
    macros = config.macros(x.dtype == torch.float16, threshold > 0, x.shape[1], len(x))
    function, where = (
        build(FEW, tuple(macros.items()), y.device.index),
        torch.cuda.current_stream(y.device).cuda_stream,
    )
    params, shared = few_params(x, weight, y, threshold, config), config.shared_bytes(x.shape[1], len(x), threshold > 0)
    function.launch_early(config.grid(y.shape[1]), config.threads, shared, params, where, config.split)
