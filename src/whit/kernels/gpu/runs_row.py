"""Up to eight rows through ggml's types, nearly as fast as these can be read (runs_row.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whit.formats.ggml.format import Ggml
from whit.formats.ggml.kinds import Kind
from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.launches import Call, device_of
from whit.kernels.gpu.scales import table
from whit.tensor import PackedWeight

SOURCE = Path(__file__).with_name("runs_row.cu")
CHUNK, STEP = 32, 128  # columns that a thread, that four threads hold together
MOST_ROWS = 8
MOST_SHARED = 227 << 10
TABLE = 256 * 128  # bytes of the pairs of a codebook, a copy for each bank
NUMBER, INTEGER = 1, 2  # what is subtracted: a number of the run, dmin times an integer


@dataclass(frozen=True)
class Config:
    """How the work is cut: warps, steps under way, blocks per multiprocessor, and those that registers are left for."""

    warps: int = 16
    ahead: int = 2
    blocks: int = 1
    room: int = 1


class Params(ctypes.Structure):
    """The argument of the kernel, field by field as in runs_tile.cuh."""

    _fields_ = (
        ("codes", ctypes.c_void_p), ("field", ctypes.c_void_p * 4),
        *((name, ctypes.c_void_p) for name in ("levels", "x", "bias", "y")),
        ("pitch", ctypes.c_int * 4),
        *((name, ctypes.c_int) for name in ("outs", "columns", "rows", "row_bytes")),
    )  # fmt: skip


def kind_of(packed: PackedWeight) -> Kind:
    """The facts of a weight of one of ggml's types."""
    assert isinstance(packed.format, Ggml)
    return packed.format.kind


def why_not(packed: PackedWeight) -> str | None:
    """Why the kernel cannot read a weight, or None."""
    if not isinstance(packed.format, Ggml):
        return f"{packed.format} is none of ggml's types"
    if packed.shape[1] % CHUNK:
        return f"{packed.shape[1]} columns are not a multiple of {CHUNK}"
    every = [packed.tensors["codes"], *(field for field in fields(packed) if field is not None)]
    return None if all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in every) else "it lies unaligned"


def fields(packed: PackedWeight) -> tuple[Tensor | None, ...]:
    """d, dmin or m, the integers of d, the integers of dmin; None for what a type lacks."""
    kind, tensors = kind_of(packed), packed.tensors
    outer = tensors["exponent" if kind.exponent else "d"]
    return outer, tensors.get("dmin", tensors.get("m")), *(tensors.get(key) for key in ("scale", "min"))


def pitches(packed: PackedWeight) -> list[int]:
    """Bytes of a row of each field."""
    return [0 if t is None else t.shape[1] * t.element_size() for t in fields(packed)]


def rounded(rows: int) -> int:
    """Rows that the kernel is built for: 1, 2, 4 or 8."""
    return 1 << (rows - 1).bit_length()


def steps(columns: int) -> int:
    """Steps of 128 columns; the last may be filled up."""
    return -(-columns // STEP)


def shared_bytes(packed: PackedWeight, config: Config, rows: int) -> int:
    """Dynamic shared memory of a block: table, x and zeros, its sums, sums and scales of two tiles."""
    kind, rows = kind_of(packed), rounded(rows)
    sums, count = rows * (2 if kind.sub_size == CHUNK // 2 else 1), steps(packed.shape[1])
    fixed = (TABLE if kind.levels else 0) + (count + 1) * sums * 256 + count * sums * 16
    return fixed + 2 * config.warps * rows * 64 + 2 * (16 * sum(pitches(packed)) + 16)


def macros(packed: PackedWeight, config: Config, half: bool, rows: int) -> dict[str, int]:
    """What runs_row.cu is compiled with."""
    kind = kind_of(packed)
    return {
        "BITS": kind.bits, "CODEBOOK": int(bool(kind.levels)), "HALF": int(half), "OFFSET": -kind.low, "ZERO": 0,
        "CHUNK": CHUNK, "RUN": kind.sub_size, "SUBS": kind.subs if kind.scale_bits else 0,
        "PART": kind.scale_bits or 8, "SCALE_BIAS": kind.scale_bias, "NUMBER": 4 if kind.exponent else 1,
        "LESS": {"": 0, "m": NUMBER, "min": INTEGER}[kind.offset], "ROWS": rounded(rows), "WARPS": config.warps,
        "AHEAD": config.ahead, "ROOM": config.room,
    }  # fmt: skip


def params(x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor) -> Params:
    """The kernel's argument for contiguous x (rows, columns) and y (rows, outs); it borrows their memory."""
    levels = table(tuple(map(float, kind_of(packed).levels)), x.dtype, x.device) if kind_of(packed).levels else None
    pointers = [None if t is None else t.data_ptr() for t in (levels, x, bias, y)]
    scales = (ctypes.c_void_p * 4)(*(None if t is None else t.data_ptr() for t in fields(packed)))
    codes = packed.tensors["codes"]
    return Params(
        codes.data_ptr(), scales, *pointers, (ctypes.c_int * 4)(*pitches(packed)), *packed.shape, len(x),
        codes.shape[1],
    )  # fmt: skip


def best(packed: PackedWeight, rows: int) -> Config | None:
    """How the product is cut, by what was fastest on an H100; None where runs_few.cu is faster or x has no room."""
    (outs, columns), bits = packed.shape, kind_of(packed).bits
    halves = kind_of(packed).sub_size < CHUNK  # x lies twice, and a product is as large for half the rows
    if rows > (2 if halves else 4):
        return None
    if rows > 2:
        cuts = [Config(16, 1)]
    elif columns >= 2 * outs:
        cuts = [Config(16, 2), Config(16, 1)] if bits == 6 else [Config(8, 4, 2, 2), Config(16, 2), Config(16, 1)]
    else:
        cuts = [Config(8, 2, 3, 3) if outs > 2 * columns else Config(16, 1, 2, 2), Config(16, 1)]
    return next((cut for cut in cuts if shared_bytes(packed, cut, rows) * cut.blocks <= MOST_SHARED), None)


def call(x: Tensor, packed: PackedWeight, bias: Tensor | None, config: Config) -> Call:
    """Contiguous x (rows, columns), up to 8 rows that begin at 16 bytes, through a weight that `why_not` allows."""
    y = torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    chosen = macros(packed, config, x.dtype == torch.float16, len(x))
    function = nvrtc.built(SOURCE, tuple(chosen.items()), x.device.index)
    most = config.blocks * device_of(x)[1]
    grid = min(-(-packed.shape[0] // 16), most)
    shared = shared_bytes(packed, config, len(x))
    return Call(function.cut((grid, 1, 1), 32 * config.warps, shared, params(x, packed, bias, y)), x, [y])
