"""Attention of one new token of each text over a static cache: attend.cu, or attend_short.cu where that is short."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import log2
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu.decoding import Run, half, launch

ATTEND, ATTEND_SHORT = (Path(__file__).with_name(f"{name}.cu") for name in ("attend", "attend_short"))
ATTEND_THREADS = 128
SHORT_WARPS, SHORT_BLOCKS, MOST_ROUNDS = 8, 128, 8  # of attend_short.cu: warps of a block, blocks, places of a lane

LOG2_E = log2(2.718281828459045)


class AttendParams(ctypes.Structure):
    """The argument of attend.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "v", "cosine", "sine", "position", "keys", "values", "mask", "slot", "y", "partial", "arrived",
        )),
        ("length", ctypes.c_int), ("scale", ctypes.c_float),
    )  # fmt: skip


class AttendShortParams(ctypes.Structure):
    """The argument of attend_short.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "v", "cosine", "sine", "position", "keys", "values", "mask", "slot", "y",
        )),
        ("length", ctypes.c_int), ("heads", ctypes.c_int), ("scale", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True)
class Chunks:
    """How attend.cu is cut: places of the cache per block, and how many chunks are read before it is known whether they
    are needed."""

    places: int = 64
    soon: int = 4

    def count(self, length: int) -> int:
        return -(-length // self.places)


def chunks_for(texts: int) -> Chunks:
    """The cut for so many sequences: memory is the limit of many."""
    return Chunks() if texts < 4 else Chunks(soon=0)


@dataclass(frozen=True)
class Workspace:
    """What `attend` needs besides its inputs, the same for all layers.

    `mask` (batch, length) bool: places that may be seen; `slot` (1,) int64: the place of the new token; `partial`
    float32 and `arrived` int32 (zeros): room for blocks to meet. `short`: how attend_short.cu is cut; None where
    attend.cu is taken.
    """

    mask: Tensor
    slot: Tensor
    partial: Tensor
    arrived: Tensor
    short: Short | None = None

    @classmethod
    def like(cls, mask: Tensor, slot: Tensor, key_heads: int, group: int, size: int) -> Workspace:
        """Room for a cache of (batch, key_heads, length, size) and `group` heads of q for each."""
        batch, length = mask.shape
        chunks = chunks_for(batch).count(length)
        partial = torch.empty(batch, key_heads, chunks, group, size + 2, dtype=torch.float32, device=mask.device)
        arrived = torch.zeros(batch, key_heads, dtype=torch.int32, device=mask.device)
        hopper = mask.is_cuda and torch.cuda.get_device_capability(mask.device)[0] == 9
        short = short_cut(batch * key_heads, length, group, size) if hopper else None
        return cls(mask, slot, partial, arrived, short)


@dataclass(frozen=True)
class Short:
    """How attend_short.cu is cut: blocks of a cluster, and places of the cache that a lane holds."""

    cluster: int
    rounds: int


def short_cut(heads: int, length: int, group: int, size: int) -> Short | None:
    """The cut for so many heads of keys (of all sequences) of `size` columns; None where the cache is too long.

    Each multiprocessor has one block at most: with two the other kernel is as fast (16 texts, on an H100).
    """
    if size not in (32, 64, 128) or group > 8:
        return None
    at_once = SHORT_WARPS * 32 // (size // 8)
    fits = [c for c in (2, 4, 8) if -(-length // (at_once * c)) <= MOST_ROUNDS and group * size % (4 * c) == 0]
    cluster = max((c for c in fits if c * heads <= SHORT_BLOCKS), default=None)
    return None if cluster is None else Short(cluster, -(-length // (at_once * cluster)))


def attend_shared(group: int, size: int, cut: Chunks, chunks: int) -> int:
    """Bytes of `Shared` in attend.cu, and of a factor per head and chunk."""
    held = 4 * (group * size + group * cut.places + 4 * group * size + 2 * group) + 4 * size + 16
    return -(-held // 16) * 16 + 4 * group * chunks


def short_shared(group: int, size: int) -> int:
    """Bytes of `Shared` in attend_short.cu, at most."""
    return 4 * (SHORT_WARPS * (group * size + 2 * group) + group * size + 16 * group) + 64


def attend(
    heads: tuple[Tensor, Tensor, Tensor], rotary: tuple[Tensor, Tensor, Tensor], cache: tuple[Tensor, Tensor],
    room: Workspace, scale: float, run: Run = launch,
) -> Tensor:  # fmt: skip
    """Attention of one new token per sequence; puts its key and value into the cache.

    heads: q (batch, heads size), k and v (batch, key heads size), not rotated; rotary: cosine and sine of all positions
    (positions, size), and the new tokens' positions (batch,) int64; cache: keys and values (batch, key heads, length,
    size), contiguous. Gives (batch, heads size).
    """
    (q, k, v), (cosine, sine, positions), (keys, values) = heads, rotary, cache
    batch, key_heads, length, size = keys.shape
    group = q.shape[1] // (key_heads * size)
    y = torch.empty_like(q)
    macros: dict[str, int] = {"HALF": half(q), "D": size, "GROUP": group}
    borrowed = (q, k, v, cosine, sine, positions, keys, values, room.mask, room.slot, y)
    if short := room.short:
        macros |= {"CLUSTER": short.cluster, "ROUNDS": short.rounds}
        near = AttendShortParams(*(t.data_ptr() for t in borrowed), length, key_heads, scale * LOG2_E)
        blocks, shared = (short.cluster * key_heads * batch, 1, 1), short_shared(group, size)
        run(ATTEND_SHORT, tuple(macros.items()), blocks, 32 * SHORT_WARPS, shared, near, q.device)
        return y
    cut = chunks_for(batch)
    macros |= {"CHUNK": cut.places, "SOON": cut.soon}
    params = AttendParams(*(t.data_ptr() for t in (*borrowed, room.partial, room.arrived)), length, scale * LOG2_E)
    grid = cut.count(length), key_heads, batch
    run(ATTEND, tuple(macros.items()), grid, ATTEND_THREADS, attend_shared(group, size, cut, grid[0]), params, q.device)
    return y
