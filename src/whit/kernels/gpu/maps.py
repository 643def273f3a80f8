"""Maps of matrices for Hopper's engine that copies tiles to shared memory."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TypeAlias

from whit.kernels.gpu import nvrtc

Map: TypeAlias = "ctypes.Array[ctypes.c_uint64]"
AHEAD_256 = 3  # of cuTensorMapEncodeTiled, as the types and swizzles below
TYPES = {1: 0, 2: 1}  # unsigned integers of so many bytes
SWIZZLES = {64: 2, 80: 0, 96: 0, 128: 3}  # by the bytes of a tile's row; 0: it lies as it is


@lru_cache(maxsize=4096)
def tiles_of(address: int, rows: int, columns: int, tall: int, wide: int, size: int = 1) -> Map:
    """A map of a contiguous matrix of elements of `size` bytes for tiles of `tall` rows and `wide` columns.

    What lies outside is 0. A tile's rows are 64 or 128 bytes, in the swizzle of that width, or 80 or 96 bytes, as they
    are.
    """
    room = ctypes.create_string_buffer(192)
    at = -(-ctypes.addressof(room) // 64) * 64
    status = nvrtc.driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), TYPES[size], 2, ctypes.c_void_p(address), (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * size), (ctypes.c_uint32 * 2)(wide, tall), (ctypes.c_uint32 * 2)(1, 1),
        0, SWIZZLES[wide * size], AHEAD_256, 0,
    )  # fmt: skip
    nvrtc.checked(status, f"map of {rows} x {columns} x {size} bytes")
    return (ctypes.c_uint64 * 16).from_buffer_copy((ctypes.c_char * 128).from_address(at))
