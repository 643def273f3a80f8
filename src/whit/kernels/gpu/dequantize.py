"""Dequantizing on its own: codes to bfloat16 or float16 at the memory's speed, equal to the reference bit for bit."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.scales import Scales, Storage, scales, table
from whit.tensor import PackedWeight, matrix_shape

SOURCE = Path(__file__).with_name("dequantize.cu")
THREADS = 256
UNITS_PER_BLOCK = 2048  # of eight columns: about 32 KB written


class Params(ctypes.Structure):
    """The argument of the kernel, field by field as in dequantize.cu."""

    _fields_ = (
        ("codes", ctypes.c_void_p), ("scales", Scales), ("table", ctypes.c_void_p), ("w", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in (
            "outs", "columns", "row_bytes", "group_size", "rows_per_block",
        )),
    )  # fmt: skip


def params(packed: PackedWeight, out: Tensor, stored: Storage) -> Params:
    """The kernel's argument; it borrows the tensors' memory."""
    codes = packed.tensors["codes"]
    row_bytes = codes.shape[1]
    levels = table(stored.levels, torch.float32, out.device).data_ptr() if stored.levels else None
    return Params(
        codes=codes.data_ptr(), scales=scales(packed, stored), table=levels, w=out.data_ptr(), outs=out.shape[0],
        columns=out.shape[1], row_bytes=row_bytes, group_size=packed.format.group_size,
        rows_per_block=max(UNITS_PER_BLOCK * 8 // max(out.shape[1], 1), 1),
    )  # fmt: skip


def macros(packed: PackedWeight, stored: Storage, half: bool) -> nvrtc.Macros:
    """What dequantize.cu is compiled with."""
    codes, columns = packed.tensors["codes"], matrix_shape(packed.shape)[1]
    word = stored.bits if stored.bits in (2, 4, 8) else 1  # bytes that eight codes are read as
    return (
        *stored.macros.items(), ("HALF", int(half)), ("WHOLE", int(columns % 8 == 0)),
        ("ALIGNED", int(columns % 8 == 0 and codes.data_ptr() % word == 0)),
        ("GROUPS_INSIDE", int(packed.format.group_size % 8 != 0)),
    )  # fmt: skip


def dequantize(packed: PackedWeight, dtype: torch.dtype, stored: Storage) -> Tensor:
    """The weight (rows, columns) in bfloat16 or float16, on its CUDA device."""
    out = torch.empty(matrix_shape(packed.shape), dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    argument = params(packed, out, stored)
    function = nvrtc.built(SOURCE, macros(packed, stored, dtype == torch.float16), out.device.index)
    shared = 4 * len(stored.levels)
    blocks = -(-out.shape[0] // argument.rows_per_block)
    function.launch((blocks, 1, 1), THREADS, shared, argument, nvrtc.stream_on(out.device.index))
    return out
