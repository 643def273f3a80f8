"""Weights whose scales belong to runs of columns on a GPU: ggml's types, ternary and binary.

Up to 16 rows are multiplied by weights that are decoded in registers (runs_few.cu); for more, and for training, the
matrix is dequantized (runs_dequantize.cu), equal to the reference bit for bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.capabilities import radix
from whit.formats.ggml.format import Ggml
from whit.formats.signs import Signs
from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.launches import Call, device_of
from whit.kernels.gpu.scales import FLOATS, table
from whit.tensor import Format, PackedWeight, matrix_shape

HERE = Path(__file__).parent
FEW, DEQUANTIZE = HERE / "runs_few.cu", HERE / "runs_dequantize.cu"
CHUNK = 32  # columns that a thread decodes together
MOST_ROWS = 16
NONE, NUMBER, INTEGER = range(3)  # what is subtracted: nothing, a number of the run, dmin times an integer
EXPONENT = 4  # a scale that is a power of two, as a byte
ALIGNED = {1: 4, 2: 8, 3: 4, 4: 16, 5: 4, 6: 8, 8: 16}  # bytes, by the width of a code
THREADS, BLOCKS_EACH = 256, 16  # of runs_dequantize.cu; per multiprocessor


@dataclass(frozen=True)
class Scheme:
    """What the kernels must know of a format when they are built; runs.cuh explains the names."""

    bits: int
    run: int
    scale: int
    low: int
    digits: bool = False
    stride: int = 1
    subs: int = 0
    part: int = 8
    bias: int = 0
    less: int = NONE
    levels: tuple[int, ...] = ()

    @property
    def macros(self) -> dict[str, int]:
        return {
            "BITS": self.bits, "DIGITS": int(self.digits), "RUN": self.run, "SUBS": self.subs, "PART": self.part,
            "BIAS": self.bias, "NUMBER": self.scale, "LESS": self.less, "LOW": self.low, "STRIDE": self.stride,
            "TABLE": int(bool(self.levels)),
        }  # fmt: skip


@lru_cache(maxsize=256)
def scheme(format: Format, columns: int) -> Scheme | str:
    """How a weight of so many columns is stored, or why the kernels cannot read it."""
    if isinstance(format, Ggml):
        kind = format.kind
        less = {"": NONE, "m": NUMBER, "min": INTEGER}[kind.offset]
        found = Scheme(
            kind.bits, kind.sub_size, EXPONENT if kind.exponent else FLOATS["f16"], kind.low,
            subs=kind.subs if kind.scale_bits else 0, part=kind.scale_bits or 8, bias=kind.scale_bias, less=less,
            levels=kind.levels,
        )  # fmt: skip
    elif isinstance(format, Signs):
        ternary = radix(format) is not None
        found = Scheme(
            format.bits, format.group_size, FLOATS[format.scale_type], -1, digits=ternary, stride=1 if ternary else 2
        )
    else:
        return f"{format}: its scales do not belong to runs of columns"
    if columns % CHUNK or not columns:
        return f"{format} with {columns} columns, not a multiple of {CHUNK}"
    if found.run != CHUNK // 2 and found.run % CHUNK:
        return f"{format}: runs of {found.run} columns are neither {CHUNK // 2} nor a multiple of {CHUNK}"
    return found


class WeightParams(ctypes.Structure):
    """Where a weight lies, field by field as in runs.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "less", "scales", "mins", "levels")),
        ("bytes", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("outs", "columns", "row_bytes", "runs", "supers", "part_bytes")),
    )  # fmt: skip


class FewParams(ctypes.Structure):
    """The argument of runs_few.cu."""

    _fields_ = (
        ("w", WeightParams), *((name, ctypes.c_void_p) for name in ("x", "bias", "y")), ("rows", ctypes.c_int),
    )  # fmt: skip


class DequantizeParams(ctypes.Structure):
    """The argument of runs_dequantize.cu."""

    _fields_ = (("w", WeightParams), ("to", ctypes.c_void_p))


@dataclass(frozen=True)
class Config:
    """How the work is cut; runs_few.cu explains the names."""

    warps: int = 8
    ahead: int = 1
    min_blocks: int = 3


def best(shape: tuple[int, ...], rows: int) -> Config:
    """The cut for x (rows, columns) and a weight of `shape` (outs, columns), by what was fastest on an H200."""
    if rows > 4:
        return Config(8, 1, 3)
    return Config(16, 1, 2) if shape[1] >= 2 * shape[0] else Config(8, 1, 4)


def unaligned(packed: PackedWeight, found: Scheme) -> str | None:
    """Why the codes cannot be read in whole words, or None."""
    codes, want = packed.tensors["codes"], 1 if found.digits else ALIGNED[found.bits]
    return None if codes.is_contiguous() and codes.data_ptr() % want == 0 else f"the codes do not begin at {want} bytes"


def weight_params(packed: PackedWeight, found: Scheme) -> WeightParams:
    """Pointers into the packed tensors, which must outlive the launch."""
    tensors, (outs, columns) = packed.tensors, matrix_shape(packed.shape)
    outer = next(tensors[key] for key in ("d", "exponent", "scale") if key in tensors)
    less = tensors.get("dmin" if found.less == INTEGER else "m")
    scales, mins = (tensors["scale"], tensors.get("min")) if found.subs else (None, None)
    levels = table(tuple(map(float, found.levels)), torch.float32, packed.device) if found.levels else None
    pointers = [None if t is None else t.data_ptr() for t in (tensors["codes"], outer, less, scales, mins, levels)]
    return WeightParams(
        *pointers, tensors["codes"].numel(), outs, columns, tensors["codes"].shape[1],
        0 if outer.numel() == 1 and outs > 1 else outer.shape[1], outer.shape[1],
        0 if scales is None else scales.shape[1],
    )  # fmt: skip


def few_macros(found: Scheme, config: Config, half: bool, rows: int) -> dict[str, int]:
    """What runs_few.cu is compiled with, for up to 32 rows."""
    return found.macros | {
        "HALF": int(half), "ROWS": 1 << (rows - 1).bit_length(), "WARPS": config.warps, "AHEAD": config.ahead,
        "MIN_BLOCKS": config.min_blocks,
    }  # fmt: skip


def tables_bytes(found: Scheme) -> int:
    """Shared memory of the tables."""
    return 512 if found.digits else 64 if found.levels else 0


def few_shared_bytes(found: Scheme, config: Config, rows: int) -> int:
    """Dynamic shared memory of a block."""
    return tables_bytes(found) + config.warps * (1 << (rows - 1).bit_length()) * 64


def few_params(x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor, found: Scheme) -> FewParams:
    """The argument for contiguous x (rows, columns) and y (rows, outs)."""
    return FewParams(
        weight_params(packed, found), x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), len(x)
    )


def call(x: Tensor, packed: PackedWeight, bias: Tensor | None, found: Scheme, config: Config) -> Call:
    """Contiguous x (rows, columns), up to 32 rows that begin at 16 bytes, through the weight."""
    y = torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    macros = few_macros(found, config, x.dtype == torch.float16, len(x))
    function = nvrtc.built(FEW, tuple(macros.items()), x.device.index)
    shared, params = few_shared_bytes(found, config, len(x)), few_params(x, packed, bias, y, found)
    grid = -(-packed.shape[0] // 16), 1, 1
    return Call(function.cut(grid, 32 * config.warps, shared, params, early=False), x, [y])


def dequantize(packed: PackedWeight, dtype: torch.dtype, found: Scheme) -> Tensor:
    """The weight (outs, columns) in bfloat16 or float16, on its CUDA device."""
    out = torch.empty(matrix_shape(packed.shape), dtype=dtype, device=packed.device)
    macros, device = found.macros | {"HALF": int(dtype == torch.float16)}, out.device.index
    function = nvrtc.built(DEQUANTIZE, tuple(macros.items()), device)
    most = BLOCKS_EACH * device_of(out)[1]
    blocks = min(-(-out.numel() // (8 * THREADS)), most)
    where = nvrtc.stream_on(out.device.index)
    argument = DequantizeParams(weight_params(packed, found), out.data_ptr())
    function.launch((blocks, 1, 1), THREADS, tables_bytes(found), argument, where)
    return out
