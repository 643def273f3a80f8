"""Products of up to 64 quantized rows in int8 on Hopper; the next begins beside their end (int8_thin.cu says how)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.int8 import AT_ONCE, BYTES, HERE, LARGEST_SHARED, STEP, Mapped, Rows, Weight, tiles_of

THIN = HERE / "int8_thin.cu"
BESIDE = 112 << 10  # bytes of shared memory of each of two blocks beside each other and one that quantizes rows


MOST_THIN = 64  # rows


@dataclass(frozen=True)
class Thin:
    """How the work is cut for up to 64 rows; int8_thin.cu explains the names.

    The next kernel may begin when `late` steps are still to be asked for; at most `pace` are under way.
    """

    outs: int = 128
    stages: int = 4
    split: int = 1
    lead: int = 4
    late: int = 99
    blocks: int = 2
    pace: int = 99

    @property
    def threads(self) -> int:
        return 128 * max(self.outs // 128, 1) + 128

    def grid(self, outs: int) -> nvrtc.Dims:
        """A cluster per tile."""
        return -(-outs // self.outs) * self.split, 1, 1

    def shared_bytes(self, rows: int, outliers: bool = True) -> int:
        """Dynamic shared memory of a block: stages, later sums; barriers; what lies aside."""
        room, share = room_for(rows), self.outs // self.split
        laid = max(STEP * (self.stages * self.outs + self.lead * room), 4 * room * self.outs)
        aside = 4 * (2 * share + 2 * room) + (4 + 4 * AT_ONCE * (room + share) if outliers else 0)
        return 1024 + -(-laid // 1024) * 1024 + 16 * self.stages + 8 * self.lead + 16 + aside

    def fits(self, rows: int) -> bool:
        """Whether its blocks' shared memory is there."""
        return rows <= MOST_THIN and self.shared_bytes(rows) <= (LARGEST_SHARED if self.blocks == 1 else BESIDE)

    def macros(self, half: bool, outliers: bool, rows: int) -> dict[str, int]:
        """What int8_thin.cu is compiled with."""
        return BYTES | {
            "HALF": int(half), "BN": room_for(rows), "OUTS": self.outs, "STAGES": self.stages, "SPLITS": self.split,
            "LEAD": self.lead, "PACE": min(self.pace, self.stages), "BLOCKS": self.blocks, "OUTLIERS": int(outliers),
        }  # fmt: skip


def room_for(rows: int) -> int:
    """Rows for which int8_thin.cu makes room."""
    return next(room for room in (8, 16, 32, MOST_THIN) if rows <= room)


class ThinParams(ctypes.Structure):
    """The argument of int8_thin.cu, field by field."""

    _fields_ = (
        ("x_map", ctypes.c_uint64 * 16), ("weight_map", ctypes.c_uint64 * 16),
        *((name, ctypes.c_void_p) for name in (
            "codes", "floats", "scale", "offset", "row_scale", "bias", "listed", "y",
        )),
        *((name, ctypes.c_int) for name in ("outs", "columns", "rows", "late")),
        ("rest", ctypes.c_int * 12),  # the maps make it a multiple of 64 bytes
    )  # fmt: skip


def thin_params(rows: Rows, weight: Weight, y: Tensor, config: Thin, mapped: Mapped | None = None) -> ThinParams:
    """The kernel's argument; it borrows the tensors' memory."""
    (count, outs), columns, mapped = y.shape, rows.codes.shape[1], mapped or tiles_of
    tensors = (weight.codes, rows.floats, rows.scale, rows.offset, weight.row_scale, weight.bias, rows.listed, y)
    return ThinParams(
        mapped(rows.codes.data_ptr(), count, columns, room_for(count)),
        mapped(weight.codes.data_ptr(), outs, columns, config.outs),
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        outs=outs, columns=columns, rows=count, late=config.late,
    )  # fmt: skip


def multiply_thin(rows: Rows, weight: Weight, y: Tensor, config: Thin) -> None:
    """Fill y (rows, outs) with up to 64 rows, none with a zero point, through the weight."""
    outliers, device = rows.listed is not None, y.device.index
    function = nvrtc.built(THIN, tuple(config.macros(y.dtype == torch.float16, outliers, len(y)).items()), device)
    params, shared = thin_params(rows, weight, y, config), config.shared_bytes(len(y), outliers)
    where = nvrtc.stream_on(y.device.index)
    function.launch_early(config.grid(y.shape[1]), config.threads, shared, params, where, config.split)
