"""What lies between the products of a decoder when it makes one token: norms, attention over a static cache, gates.

Each is one launch, in bfloat16 or float16, and rounds where the modules of transformers do (normalize.cu, attend.cu,
gate.cu). Around the blocks lie the head of one row in 16 bits (dense.cu) and the choice of a token (choose.cu).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.kernels.gpu import nvrtc

HERE = Path(__file__).parent
NORM, GATE, ATTEND, ATTEND_SHORT, DENSE, CHOOSE = (
    HERE / f"{name}.cu" for name in ("normalize", "gate", "attend", "attend_short", "dense", "choose")
)
GATE_THREADS, CHOOSE_THREADS = 256, 1024
DENSE_THREADS, DENSE_BLOCKS = 256, 2  # of a block; blocks of a multiprocessor
LEAST_DENSE = 1 << 15  # outs of a weight that dense.cu reads faster than torch does
ATTEND_THREADS = 128
SHORT_WARPS, SHORT_BLOCKS, MOST_ROUNDS = 8, 128, 8  # of attend_short.cu: warps of a block, blocks, places of a lane
LOG2_E = log2(2.718281828459045)
Macros: TypeAlias = tuple[tuple[str, int], ...]
Grid: TypeAlias = tuple[int, int, int]
Run: TypeAlias = Callable[[Path, Macros, Grid, int, int, ctypes.Structure, torch.device], None]


class NormParams(ctypes.Structure):
    """The argument of normalize.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("residual", "added", "weight", "y")), ("epsilon", ctypes.c_float),
    )  # fmt: skip


class GateParams(ctypes.Structure):
    """The argument of gate.cu."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("gate", "up", "y")), ("units", ctypes.c_int))


class DenseParams(ctypes.Structure):
    """The argument of dense.cu."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "w", "y")), ("outs", ctypes.c_int))


class ChooseParams(ctypes.Structure):
    """The argument of choose.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "stops", "padding", "ended", "chosen", "column", "tokens")),
        ("vocabulary", ctypes.c_int), ("length", ctypes.c_int),
    )  # fmt: skip


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


@lru_cache(maxsize=64)
def build(source: Path, macros: Macros, device: int) -> nvrtc.Function:
    """The compiled kernel on a device; it is called what its file is called."""
    return nvrtc.build(source, dict(macros), source.stem, device)


def launch(
    source: Path, macros: Macros, grid: Grid, threads: int, shared: int, params: ctypes.Structure, device: torch.device
) -> None:
    """Enqueue a kernel on torch's current stream, in clusters where its macros say so."""
    where = nvrtc.stream_on(device.index)
    cluster = dict(macros).get("CLUSTER", 1)
    build(source, macros, device.index).launch_early(grid, threads, shared, params, where, cluster)


def half(x: Tensor) -> int:
    """1 for float16, 0 for bfloat16. Raises KernelError for other types."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise KernelError(f"decoding kernels: x is {x.dtype}; it must be bfloat16 or float16; convert the model")
    return int(x.dtype == torch.float16)


def norm_threads(columns: int) -> int:
    """A thread per eight columns, up to 512."""
    return min(max(-(-columns // 8 // 32) * 32, 32), 512)


def norm(residual: Tensor, added: Tensor | None, weight: Tensor, epsilon: float, run: Run = launch) -> Tensor:
    """residual (rows, columns) += added, in place; its RMS norm times weight (columns,). Columns: a multiple of 8."""
    rows, columns = residual.shape
    y = torch.empty_like(residual)
    threads, adds = norm_threads(columns), int(added is not None)
    macros = (("HALF", half(residual)), ("COLUMNS", columns), ("THREADS", threads), ("ADDED", adds))
    params = NormParams(
        residual.data_ptr(), None if added is None else added.data_ptr(), weight.data_ptr(), y.data_ptr(), epsilon
    )
    run(NORM, macros, (rows, 1, 1), threads, 128, params, residual.device)
    return y


def gate(gates: Tensor, ups: Tensor, run: Run = launch) -> Tensor:
    """silu(gates) * ups, elementwise; as many elements as a multiple of 8."""
    y = torch.empty_like(gates)
    units = gates.numel() // 8
    macros = (("HALF", half(gates)), ("THREADS", GATE_THREADS))
    params = GateParams(gates.data_ptr(), ups.data_ptr(), y.data_ptr(), units)
    run(GATE, macros, (-(-units // GATE_THREADS), 1, 1), GATE_THREADS, 0, params, gates.device)
    return y


def dense_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether dense.cu is for x (rows, columns) and a weight (outs, columns): one row, and many outs."""
    like = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    lies = weight.is_contiguous() and weight.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    return like and lies and len(x) == 1 and x.shape[1] % 256 == 0 and len(weight) >= LEAST_DENSE


def dense(x: Tensor, weight: Tensor, y: Tensor, multiprocessors: int, run: Run = launch) -> None:
    """y (1, outs) = x (1, columns) times a weight (outs, columns) of its own type, where `dense_takes`."""
    macros = (("HALF", half(x)), ("COLUMNS", x.shape[1]), ("THREADS", DENSE_THREADS))
    params = DenseParams(x.data_ptr(), weight.data_ptr(), y.data_ptr(), len(weight))
    blocks = (multiprocessors * DENSE_BLOCKS, 1, 1)
    run(DENSE, macros, blocks, DENSE_THREADS, 2 * x.shape[1], params, x.device)


def choose_takes(logits: Tensor) -> bool:
    """Whether choose.cu is for logits (batch, vocabulary)."""
    return logits.dtype in (torch.bfloat16, torch.float16) and logits.shape[1] % 8 == 0


def choose(
    logits: Tensor, ends: tuple[Tensor, Tensor, Tensor], to: tuple[Tensor, Tensor, Tensor], run: Run = launch
) -> None:
    """The likeliest token of each row of logits (batch, vocabulary, a multiple of 8), put where the next step is.

    ends: the tokens that end a sequence (8,), the one that follows an end (1,), int64, and which sequences have ended
    (batch,) bool; to: chosen (batch, length), the column to fill (batch,), which becomes the next one, and tokens
    (batch, 1), int64.
    """
    (stops, padding, ended), (chosen, column, tokens) = ends, to
    macros = (("HALF", half(logits)), ("THREADS", CHOOSE_THREADS))
    borrowed = (logits, stops, padding, ended, chosen, column, tokens)
    params = ChooseParams(*(t.data_ptr() for t in borrowed), logits.shape[1], chosen.shape[1])
    run(CHOOSE, macros, (len(logits), 1, 1), CHOOSE_THREADS, 256, params, logits.device)


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
