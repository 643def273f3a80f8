"""The fused product for few rows: the packed codes stream through the tensor cores once (stream.cu says how)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.formats import Affine, Codebook
from whit.kernels.gpu import nvrtc
from whit.tensor import Format

SOURCE = Path(__file__).with_name("stream.cu")
ROWS_PER_BLOCK = 64
FLOAT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
NESTED = 3
NO_ZERO, PACKED_ZERO, FLOAT_ZERO, HALF_ZERO = range(4)
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


@dataclass(frozen=True)
class Scheme:
    """What the kernel must know of a format at compile time."""

    bits: int
    codebook: tuple[float, ...]
    offset: int
    scale: int
    zero: int
    chunk: int
    steps_per_group: int

    @property
    def step(self) -> int:
        """Columns that four threads hold together."""
        return 4 * self.chunk


class Params(ctypes.Structure):
    """The argument of the kernel, field by field as in stream.cu."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "codes", "scale", "scale_codes", "scale_levels", "scale_offset", "zero", "table", "x", "bias", "y",
            "partial", "arrived",
        )
    ) + tuple(
        (name, ctypes.c_int)
        for name in ("outs", "columns", "rows", "row_words", "groups", "zero_bytes", "split_steps")
    )  # fmt: skip


@lru_cache(maxsize=1024)
def scheme(format: Format, columns: int) -> Scheme | str:
    """The scheme for a weight of that many columns, or the reason why the kernel cannot run it."""
    if not isinstance(format, Affine | Codebook):
        return f"{format} has neither integers nor a table"
    bits, group = format.bits, format.group_size
    if isinstance(format, Codebook):
        if bits != 4 or format.centered:
            return f"{format}: the table must have 9 to 16 levels, not centered"
        levels = format.levels + (0.0,) * (16 - len(format.levels))
        offset, scale, zero = 0, NESTED if format.double_quant else 2, NO_ZERO
    else:
        if format.per_tensor:
            return f"{format}: one scale for the whole tensor"
        if format.float_zero and not group:
            return f"{format}: zero points per row"
        levels, offset = (), -format.code_min
        scale = {"bf16": 0, "f16": 1, "f32": 2}[format.scale_type]
        if format.symmetric:
            zero = NO_ZERO if bits > 1 else HALF_ZERO
        else:
            zero = FLOAT_ZERO if format.float_zero else PACKED_ZERO
    if zero and not group:  # zero points are applied per group; a row is one group of all its steps
        group = columns
    chunk = _chunk(bits, group or columns, columns)
    if not chunk:
        return f"{format} with {columns} columns: groups and rows must be multiples of {4 * _smallest(bits)} columns"
    steps = 0 if not format.group_size and not zero else group // (4 * chunk)
    return Scheme(bits, levels, offset, scale, zero, chunk, steps)


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
    return {
        "BITS": scheme.bits, "CODEBOOK": int(bool(scheme.codebook)), "HALF": int(half), "OFFSET": scheme.offset,
        "SCALE": scheme.scale, "ZERO": scheme.zero, "CHUNK": scheme.chunk, "STEPS_PER_GROUP": scheme.steps_per_group,
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
    return max((TABLE_BYTES if scheme.codebook else 0) + 2 * stage, rows * config.outs * 4)


def grid(config: Config, outs: int, rows: int) -> tuple[int, int, int]:
    """Blocks along outs, splits of the columns, and rows."""
    return -(-outs // config.outs), config.splits, -(-rows // (8 * row_tiles(rows)))


def fitted(config: Config, scheme: Scheme, columns: int) -> Config:
    """`config` with no more splits than there are steps, none of them empty."""
    steps = columns // scheme.step
    per_split = -(-steps // min(config.splits, steps))
    return Config(**{**config.__dict__, "splits": -(-steps // per_split)})


@lru_cache(maxsize=64)
def table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The levels of a codebook on the device."""
    return torch.tensor(levels, dtype=dtype, device=device)


@dataclass(frozen=True)
class Operands:
    """Tensors of one product; x (rows, columns) and y (rows, outs) contiguous."""

    x: Tensor
    y: Tensor
    bias: Tensor | None
    packed: Mapping[str, Tensor]
    partial: Tensor | None
    arrived: Tensor | None


def params(operands: Operands, scheme: Scheme, config: Config) -> Params:
    """The kernel's argument; it borrows the tensors' memory."""
    tensors, x = operands.packed, operands.x
    rows, columns = x.shape
    outs = operands.y.shape[1]
    values: dict[str, Tensor | int | None] = {
        "codes": tensors["codes"], "x": x, "y": operands.y, "bias": operands.bias, "partial": operands.partial,
        "arrived": operands.arrived, "zero": tensors.get("zero_point"), "outs": outs, "columns": columns, "rows": rows,
        "row_words": tensors["codes"].shape[1] // 4,
        "groups": columns // (scheme.step * scheme.steps_per_group) if scheme.steps_per_group else 1,
        "split_steps": -(-(columns // scheme.step) // config.splits),
    }  # fmt: skip
    if "zero_point" in tensors and scheme.zero == PACKED_ZERO:
        values["zero_bytes"] = tensors["zero_point"].shape[1]
    if scheme.codebook:
        values["table"] = table(scheme.codebook, x.dtype, x.device)
    if scheme.scale == NESTED:
        dynamic = _dynamic_levels()
        values |= {
            "scale_codes": tensors["absmax_codes"], "scale": tensors["absmax_absmax"],
            "scale_offset": tensors["absmax_offset"], "scale_levels": table(dynamic, torch.float32, x.device),
        }  # fmt: skip
    else:
        values["scale"] = tensors["absmax" if scheme.codebook else "scale"]
    pointers = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()}
    return Params(**{k: v for k, v in pointers.items() if v is not None})


@lru_cache(maxsize=1)
def _dynamic_levels() -> tuple[float, ...]:
    from whit.formats.codebook import TABLES

    return TABLES["dynamic8"]


@lru_cache(maxsize=512)
def build(scheme: Scheme, config: Config, half: bool, tiles: int, device: int) -> nvrtc.Function:
    """The compiled kernel on a device, for up to 8 `tiles` rows."""
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"-D{name}={value}" for name, value in macros(scheme, config, half, 8 * tiles).items()]
    code = nvrtc.compile_source(SOURCE.read_text(), options, f"sm_{major}{minor}")
    with torch.cuda.device(device):
        return nvrtc.Function(code, "stream")


def launch(operands: Operands, scheme: Scheme, config: Config) -> None:
    """Fill operands.y. `partial` and `arrived` (zeros) are needed where config.splits > 1."""
    x = operands.x
    rows = x.shape[0]
    function = build(scheme, config, x.dtype == torch.float16, row_tiles(rows), x.device.index)
    argument = params(operands, scheme, config)
    cut, shared = grid(config, operands.y.shape[1], rows), shared_bytes(scheme, config, rows)
    function.launch(cut, config.threads, shared, argument, torch.cuda.current_stream(x.device).cuda_stream)
