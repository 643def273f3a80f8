"""The fused product for few rows: the packed codes stream through the tensor cores once (stream.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.scales import Scales, Storage, scales, storage, table
from whit.tensor import Format, PackedWeight

SOURCE = Path(__file__).with_name("stream.cu")
ROWS_PER_BLOCK = 64
TABLE_BYTES = 256 * 32 * 4


@dataclass(frozen=True)
class Config:
    """How the work is cut; stream.cu explains the names. `splits` are blocks along the columns."""

    tiles: int = 1
    warps_out: int = 4
    warps_columns: int = 2
    depth: int = 2
    splits: int = 1
    min_blocks: int = 2

    @property
    def outs(self) -> int:
        return 16 * self.tiles * self.warps_out

    @property
    def threads(self) -> int:
        return 32 * self.warps_out * self.warps_columns

    @property
    def whole(self) -> Config:
        """Without splits, which are not part of what is compiled."""
        return replace(self, splits=1)


@dataclass(frozen=True)
class Scheme:
    """What the kernel must know of a format at compile time. `spread`: groups side by side in a step."""

    storage: Storage
    chunk: int
    steps_per_group: int
    spread: int = 1

    @property
    def step(self) -> int:
        """Columns that four threads hold together."""
        return 4 * self.chunk

    def splits(self, most: int, columns: int) -> int:
        """How many splits of the columns there are: as many as there are steps at most, none of them empty."""
        steps = columns // self.step
        per_split = -(-steps // min(most, steps))
        return -(-steps // per_split)


class Params(ctypes.Structure):
    """The argument of the kernel, field by field as in sums.cuh."""

    _fields_ = (
        ("codes", ctypes.c_void_p), ("scales", Scales),
        *((name, ctypes.c_void_p) for name in ("table", "x", "bias", "y", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("outs", "columns", "rows", "row_words", "split_steps")),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def scheme(format: Format, columns: int) -> Scheme | str:
    """The scheme for a weight of that many columns, or the reason why the kernel cannot run it."""
    stored = storage(format)
    if isinstance(stored, str):
        return stored
    if stored.levels and stored.bits != 4:
        return f"{format}: the table must have 9 to 16 levels"
    group = format.group_size or (columns if stored.zero else 0)  # zero points are applied group by group
    chunk = _chunk(stored.bits, group or columns, columns)
    if not chunk:
        multiple = 4 * _smallest(stored.bits)
        return f"{format} with {columns} columns: groups and rows must be multiples of {multiple} columns"
    return Scheme(stored, chunk, group // (4 * chunk))


def _smallest(bits: int) -> int:
    return max(8, 32 // bits) if 32 % bits == 0 else 32


def _chunk(bits: int, group: int, columns: int) -> int:
    """Columns per thread and step: as many as 16 bytes hold, whole words, inside a group; 0 if there are none."""
    largest = min(128 // bits, 64) if 32 % bits == 0 else 32
    chunk = largest
    while chunk >= _smallest(bits):
        if group % (4 * chunk) == 0 and columns % (4 * chunk) == 0:
            return chunk
        chunk //= 2
    return 0


def macros(scheme: Scheme, config: Config, half: bool, rows: int) -> dict[str, int]:
    """What stream.cu is compiled with, for up to `rows` rows."""
    return scheme.storage.macros | {
        "HALF": int(half), "CHUNK": scheme.chunk, "STEPS_PER_GROUP": scheme.steps_per_group,
        "MT": config.tiles, "NT": row_tiles(rows), "WO": config.warps_out, "WK": config.warps_columns,
        "DEPTH": config.depth, "MIN_BLOCKS": config.min_blocks,
    }  # fmt: skip


def row_tiles(rows: int) -> int:
    """Tiles of 8 rows in a block: a power of two up to 8."""
    return min(1 << max((rows - 1) // 8, 0).bit_length(), ROWS_PER_BLOCK // 8)


def shared_bytes(scheme: Scheme, config: Config, rows: int) -> int:
    """Dynamic shared memory of a block: the table, two stages of x; at the end the sums."""
    rows = min(rows, ROWS_PER_BLOCK)
    stage = config.warps_columns * config.depth * scheme.step * rows * 2
    return max((TABLE_BYTES if scheme.storage.levels else 0) + 2 * stage, rows * config.outs * 4)


def grid(config: Config, outs: int, rows: int) -> tuple[int, int, int]:
    """Blocks along outs, splits of the columns, and rows."""
    return -(-outs // config.outs), config.splits, -(-rows // (8 * row_tiles(rows)))


def fitted(config: Config, scheme: Scheme, columns: int) -> Config:
    """`config` with as many splits as `scheme` has room for."""
    return replace(config, splits=scheme.splits(config.splits, columns))


@dataclass(frozen=True)
class Operands:
    """Tensors of one product; x (rows, columns) and y (rows, outs) contiguous."""

    x: Tensor
    y: Tensor
    bias: Tensor | None
    packed: PackedWeight
    partial: Tensor | None
    arrived: Tensor | None


def params(operands: Operands, scheme: Scheme, splits: int) -> Params:
    """The kernel's argument; it borrows the tensors' memory."""
    x, stored, codes = operands.x, scheme.storage, operands.packed.tensors["codes"]
    rows, columns = x.shape
    levels = table(stored.levels, x.dtype, x.device) if stored.levels else None
    pointers = {
        "codes": codes, "table": levels, "x": x, "bias": operands.bias, "y": operands.y, "partial": operands.partial,
        "arrived": operands.arrived,
    }  # fmt: skip
    return Params(
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in pointers.items()},
        scales=scales(operands.packed, stored), outs=operands.y.shape[1], columns=columns, rows=rows,
        row_words=codes.shape[1] // 4, split_steps=-(-(columns // scheme.step) // splits),
    )  # fmt: skip


@lru_cache(maxsize=512)
def build(scheme: Scheme, config: Config, half: bool, tiles: int, device: int) -> nvrtc.Function:
    """The compiled kernel on a device, for up to 8 `tiles` rows."""
    return nvrtc.build(SOURCE, macros(scheme, config, half, 8 * tiles), device)


def launch(operands: Operands, scheme: Scheme, config: Config) -> nvrtc.Launch:
    """What fills operands.y. `partial` and `arrived` (zeros) are needed where config.splits > 1."""
    x = operands.x
    rows = x.shape[0]
    function = build(scheme, config.whole, x.dtype == torch.float16, row_tiles(rows), x.device.index)
    argument = params(operands, scheme, config.splits)
    cut, shared = grid(config, operands.y.shape[1], rows), shared_bytes(scheme, config, rows)
    return function.cut(cut, config.threads, shared, argument, early=False)
