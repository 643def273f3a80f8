"""The fused product for up to 16 rows of codes of 4 bits on Hopper: x stays in registers (near.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import maps, nvrtc, stream
from whit.kernels.gpu.many import Mapped
from whit.kernels.gpu.scales import NO_ZERO, Scales, scales, table
from whit.tensor import PackedWeight

SOURCE = Path(__file__).with_name("near.cu")
MOST_ROWS = 16
SPAN = 256  # columns of a warp
TILE = 16  # outs
LARGEST_SHARED = 227 << 10
SCALE_BYTES = (2, 2, 4, 1)  # by the storage of a scale


@dataclass(frozen=True)
class Config:
    """How the work is cut; near.cu explains the names."""

    warps: int = 16
    stages: int = 3

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def grid(self, outs: int, processors: int) -> nvrtc.Dims:
        """Blocks that stay and take tile after tile."""
        return min(-(-outs // TILE), processors), 1, 1

    def shared_bytes(self, scheme: stream.Scheme, rows: int) -> int:
        """Dynamic shared memory of a block, as near.cu lays it out."""
        stored, rows = scheme.storage, rounded(rows)
        scale_stage = TILE * SPAN // scheme.step * SCALE_BYTES[stored.scale] + 64 * (stored.scale == 3)
        stages = self.warps * self.stages * (TILE * SPAN // 2 + scale_stage + 8)
        levels = (stream.TABLE_BYTES if stored.levels else 0) + 1024 * (stored.scale == 3)
        return 1024 + stages + 8 * self.warps * rows * (TILE + 4) + levels + 16

    def macros(self, scheme: stream.Scheme, half: bool, rows: int) -> dict[str, int]:
        """What near.cu is compiled with."""
        return scheme.storage.macros | {
            "HALF": int(half), "CHUNK": scheme.chunk, "STEPS_PER_GROUP": 1, "ROWS": rounded(rows),
            "WARPS": self.warps, "STAGES": self.stages, "MIN_BLOCKS": 1, "NT": 2, "WG": 1,
        }  # fmt: skip


class Params(ctypes.Structure):
    """The kernel's argument, field by field as in near.cu."""

    _fields_ = (
        ("codes_map", ctypes.c_uint64 * 16), ("scales", Scales),
        *((name, ctypes.c_void_p) for name in ("table", "x", "bias", "y")),
        *((name, ctypes.c_int) for name in ("outs", "columns", "rows")), ("rest", ctypes.c_int * 9),
    )  # fmt: skip


def rounded(rows: int) -> int:
    """Rows that the kernel is built for: 1, 2, 4, 8 or 16."""
    return 1 << (rows - 1).bit_length()


def why_not(scheme: stream.Scheme, columns: int, config: Config) -> str | None:
    """Why the kernel cannot multiply such a weight, or None."""
    stored = scheme.storage
    if stored.bits != 4 or stored.zero != NO_ZERO or scheme.steps_per_group != 1:
        return "codes are not of 4 bits, have zero points or groups of other than 32, 64 or 128"
    if columns % SPAN or columns > SPAN * config.warps:
        return f"{columns} columns are no multiple of {SPAN} up to {SPAN * config.warps}"
    return None


def aligned(packed: PackedWeight) -> bool:
    """Whether the scales of a row's tile can be copied at once: its tensors begin at 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in packed.tensors.values())


def params(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor, scheme: stream.Scheme,
    mapped: Mapped = maps.tiles_of,
) -> Params:  # fmt: skip
    """The kernel's argument; it borrows the tensors' memory."""
    (rows, columns), outs, stored = x.shape, y.shape[1], scheme.storage
    levels = table(stored.levels, x.dtype, x.device) if stored.levels else None
    return Params(
        codes_map=mapped(packed.tensors["codes"].data_ptr(), outs, columns // 2, TILE, 64, 1),
        scales=scales(packed, stored), table=None if levels is None else levels.data_ptr(), x=x.data_ptr(),
        bias=None if bias is None else bias.data_ptr(), y=y.data_ptr(), outs=outs, columns=columns, rows=rows,
    )  # fmt: skip


@lru_cache(maxsize=512)
def build(scheme: stream.Scheme, config: Config, half: bool, rows: int, device: int) -> nvrtc.Function:
    """The compiled kernel on a device."""
    return nvrtc.build(SOURCE, config.macros(scheme, half, rows), "near", device)


def launch(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor, scheme: stream.Scheme, config: Config,
    multiprocessors: int,
) -> None:  # fmt: skip
    """Fill y from contiguous x (rows, columns), which begins at 16 bytes."""
    rows = len(x)
    function = build(scheme, config, x.dtype == torch.float16, rounded(rows), x.device.index)
    where = torch.cuda.current_stream(x.device).cuda_stream
    grid, shared = config.grid(y.shape[1], multiprocessors), config.shared_bytes(scheme, rows)
    function.launch_early(grid, config.threads, shared, params(x, packed, bias, y, scheme), where)
