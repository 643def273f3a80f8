"""Up to four rows of bfloat16 through ternary weights on Hopper, as fast as these can be read (ternary.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.formats.signs import Signs
from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.scales import FLOATS
from whit.tensor import Format, PackedWeight, radix

SOURCE = Path(__file__).with_name("ternary.cu")
MOST_ROWS = 4
MOST_SHARED = 227 << 10
STEP, PARTS = 320, 10  # columns that four threads hold together; sixteenths of bytes of x per thread and step
MOST_KEPT = 80  # registers of x that a thread keeps
TABLE = 1 << 16  # bytes


@dataclass(frozen=True)
class Config:
    """How the work is cut; ternary.cu explains the names."""

    warps: int = 8
    stages: int = 3
    min_blocks: int = 1
    side: int = 1


class Params(ctypes.Structure):
    """The argument of the kernel, field by field as in ternary.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "x", "bias", "y")),
        *((name, ctypes.c_longlong) for name in ("code_bytes", "scale_bytes")),
        *((name, ctypes.c_int) for name in ("outs", "columns", "rows", "row_bytes", "runs")),
    )  # fmt: skip


def rounded(rows: int) -> int:
    """Rows that the kernel is built for: 1, 2 or 4."""
    return 1 << (rows - 1).bit_length()


def why_not(packed: PackedWeight) -> str | None:
    """Why the kernel cannot read a weight, or None."""
    return _why_not(packed.format) or (
        None if all(packed.tensors[key].data_ptr() % 16 == 0 for key in ("codes", "scale")) else "it lies unaligned"
    )


@lru_cache(maxsize=64)
def _why_not(format: Format) -> str | None:
    if not isinstance(format, Signs) or radix(format) != 3:
        return f"{format} is not ternary"
    run = format.group_size
    return None if run % 64 == 0 and not run & (run - 1) else f"{format}: runs are no 64, 128, 256, ... columns"


def steps(columns: int) -> int:
    """Steps of 320 columns; the last may be filled up."""
    return -(-columns // STEP)


def slot_bytes(packed: PackedWeight, config: Config) -> int:
    """Of a tile of W and its scales."""
    scale = packed.tensors["scale"]
    runs = 0 if scale.numel() == 1 else scale.shape[1]
    return 16 * config.side * (packed.tensors["codes"].shape[1] + runs * scale.element_size())


def shared_bytes(packed: PackedWeight, config: Config, rows: int) -> int:
    """Dynamic shared memory of a block: table, x (in its gaps and behind), its sums, those of two tiles, slots."""
    rows, count = rounded(rows), steps(packed.shape[1])
    fixed = max(TABLE, rows * count * PARTS * 256) + rows * count * 32 + 128 * config.warps * rows * config.side
    return fixed + config.stages * slot_bytes(packed, config) + 80  # the last row is read beyond its end


def best(packed: PackedWeight, rows: int) -> Config | None:
    """How the product is cut, by what was fastest on an H100; None where x and two tiles have no room."""
    if rows > MOST_ROWS:
        return None
    count = steps(packed.shape[1])
    each = 1 if count <= 16 else -(-count // 16) + 1  # steps of a warp
    cuts = (Config(-(-count // each), 2, 1, side) for side in ((2, 1) if rows == 1 else (1,)))
    return next((cut for cut in cuts if shared_bytes(packed, cut, rows) <= MOST_SHARED), None)


def macros(packed: PackedWeight, config: Config, rows: int) -> dict[str, int]:
    """What ternary.cu is compiled with."""
    format, codes = packed.format, packed.tensors["codes"]
    assert isinstance(format, Signs)
    each = -(-steps(packed.shape[1]) // config.warps)
    return {
        "HALF": 0, "RUN": format.group_size, "NUMBER": FLOATS[format.scale_type], "ROWS": rounded(rows),
        "WARPS": config.warps, "STAGES": config.stages, "ODD": int(codes.shape[1] % 4 != 0),
        "MIN_BLOCKS": config.min_blocks, "EACH": each, "SIDE": config.side,
        "STAYS": int(rounded(rows) * each * PARTS * 4 <= MOST_KEPT),
    }  # fmt: skip


def params(x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor) -> Params:
    """The kernel's argument for contiguous x (rows, columns) and y (rows, outs); it borrows their memory."""
    codes, scale = packed.tensors["codes"], packed.tensors["scale"]
    pointers = [None if t is None else t.data_ptr() for t in (codes, scale, x, bias, y)]
    return Params(
        *pointers, codes.numel(), scale.nbytes, *packed.shape, len(x), codes.shape[1],
        0 if scale.numel() == 1 else scale.shape[1],
    )  # fmt: skip


@lru_cache(maxsize=64)
def _build(macros: tuple[tuple[str, int], ...], device: int) -> nvrtc.Function:
    return nvrtc.build(SOURCE, dict(macros), "ternary", device)


def multiply(x: Tensor, packed: PackedWeight, bias: Tensor | None, config: Config) -> Tensor:
    """Contiguous x (rows, columns) of bfloat16, up to 4 rows, through a weight that `why_not` has nothing against."""
    y = torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    function = _build(tuple(macros(packed, config, len(x)).items()), x.device.index)
    blocks = config.min_blocks * torch.cuda.get_device_properties(x.device).multi_processor_count
    grid = min(-(-packed.shape[0] // (16 * config.side)), blocks)
    where = torch.cuda.current_stream(x.device).cuda_stream
    shared = shared_bytes(packed, config, len(x))
    function.launch_early((grid, 1, 1), 32 * config.warps, shared, params(x, packed, bias, y), where)
    return y
