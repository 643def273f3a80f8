"""How a format lies in layout `bits`, told to a kernel: macros when it is built, pointers when it runs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from whit.formats import Affine, Codebook
from whit.formats.codebook import dynamic_levels
from whit.tensor import Format, PackedWeight, matrix_shape

FLOATS = {"bf16": 0, "f16": 1, "f32": 2}
NESTED = 3  # a float32 that is itself quantized
NO_ZERO, PACKED_ZERO, FLOAT_ZERO, HALF_ZERO = range(4)


class Scales(ctypes.Structure):
    """Where scales and zero points lie, field by field as in common.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "codes", "levels", "offset", "zero")),
        ("groups", ctypes.c_int), ("zero_bytes", ctypes.c_int),
    )  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """What a kernel must know of a format when it is built. Without levels codes are integers from -`offset`."""

    bits: int
    levels: tuple[float, ...]
    offset: int
    scale: int
    zero: int

    @property
    def macros(self) -> dict[str, int]:
        return {
            "BITS": self.bits, "CODEBOOK": int(bool(self.levels)), "OFFSET": self.offset, "SCALE": self.scale,
            "ZERO": self.zero,
        }  # fmt: skip


@lru_cache(maxsize=256)
def storage(format: Format) -> Storage | str:
    """How the format is stored, or why the kernels cannot read it."""
    if isinstance(format, Codebook):
        if format.centered:
            return f"{format}: centered"
        levels = format.levels + (0.0,) * ((1 << format.bits) - len(format.levels))
        return Storage(format.bits, levels, 0, NESTED if format.double_quant else FLOATS["f32"], NO_ZERO)
    if not isinstance(format, Affine):
        return f"{format} has neither integers nor a table"
    if format.per_tensor:
        return f"{format}: one scale for the whole tensor"
    if format.symmetric:
        zero = NO_ZERO if format.bits > 1 else HALF_ZERO
    else:
        zero = FLOAT_ZERO if format.float_zero else PACKED_ZERO
    return Storage(format.bits, (), -format.code_min, FLOATS[format.scale_type], zero)


def scales(packed: PackedWeight, stored: Storage) -> Scales:
    """Pointers into the packed tensors, which must outlive the launch."""
    tensors = packed.tensors
    if stored.scale == NESTED:
        rows = matrix_shape(packed.shape)[0]
        codes = tensors["absmax_codes"]
        levels = nested_table(codes.device)
        absmax, offset = tensors["absmax_absmax"], tensors["absmax_offset"]
        groups = codes.numel() // rows
        return Scales(absmax.data_ptr(), codes.data_ptr(), levels.data_ptr(), offset.data_ptr(), None, groups, 0)
    scale = tensors["absmax" if stored.levels else "scale"]
    zero = tensors.get("zero_point")
    zero_bytes = zero.shape[1] if zero is not None else 0
    return Scales(
        scale.data_ptr(), None, None, None, None if zero is None else zero.data_ptr(), scale.shape[1], zero_bytes
    )


@cache
def nested_table(device: torch.device) -> Tensor:
    """The 256 levels of quantized scales on the device."""
    return torch.tensor(dynamic_levels(), dtype=torch.float32, device=device)


@cache  # launches that weights keep point to it
def table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The levels of a codebook on the device."""
    return torch.tensor(levels, dtype=dtype, device=device)
