"""The fused product for up to 16 rows: blocks that stay, and few instructions per code (few.cu says how)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc, stream
from whit.kernels.gpu.stream import Operands, Scheme

SOURCE = Path(__file__).with_name("few.cu")
MOST_ROWS = 16
STRAIGHT = (4, 8)  # bits of codes whose operands are eight neighbouring columns of x
MOST_SHARED = 226 << 10
SHARED_BEGINS = 1024  # the address, on Hopper: what is before is the system's
SCALE_BYTES = (2, 2, 4, 1)  # by the storage of a scale


@dataclass(frozen=True)
class Config:
    """How the work is cut; few.cu explains the names."""

    warps: int = 8
    ahead: int = 4
    min_blocks: int = 2
    spread: int = 1
    wide: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps


def rounded(rows: int) -> int:
    """Rows that the kernel is built for: 1, 2, 4, 8 or 16."""
    return 1 << (rows - 1).bit_length()


@dataclass(frozen=True)
class Ends:
    """What the kernel does for the one row of a token besides a product, in place of launches of its own.

    norm (columns,): x is multiplied as its RMS norm times this, with `epsilon`; gated: the two weights are gate and up,
    and both have y = silu(gate) * up; onto: the one weight's result is added to what y has.
    """

    norm: Tensor | None = None
    epsilon: float = 0.0
    gated: bool = False
    onto: bool = False


PLAIN = Ends()


@dataclass(frozen=True)
class Case:
    """What else few.cu is compiled for: float16, up to `rows` rows (rounded), `parts` weights, even cuts; `Ends`, with
    the columns of x where it is normed."""

    half: bool
    rows: int
    parts: int = 1
    even: bool = False
    normed: int = 0
    gated: bool = False
    onto: bool = False


def spread_of(scheme: Scheme, config: Config) -> Scheme:
    """The scheme in whose steps `spread` times as many groups lie side by side."""
    return replace(scheme, chunk=scheme.chunk * config.spread, spread=scheme.spread * config.spread)


def scaled(wide: Scheme, rows: int) -> bool:
    """Whether codes get their scales before they are multiplied: groups of a step and rows are more than eight."""
    return wide.spread > 1 and rounded(rows) * wide.spread > 8


def macros(scheme: Scheme, config: Config, case: Case) -> dict[str, int]:
    """What few.cu is compiled with."""
    wide = spread_of(scheme, config)
    return scheme.storage.macros | {
        "HALF": int(case.half), "CHUNK": wide.chunk, "STEPS_PER_GROUP": scheme.steps_per_group,
        "ROWS": rounded(case.rows), "WARPS": config.warps, "AHEAD": config.ahead, "MIN_BLOCKS": config.min_blocks,
        "PARTS": case.parts, "EVEN": int(case.even), "SPREAD": wide.spread, "WIDE": SHARED_BEGINS * config.wide,
        "NORMED": case.normed, "GATED": int(case.gated), "ONTO": int(case.onto),
    }  # fmt: skip


def shared_bytes(scheme: Scheme, config: Config, rows: int, steps: int) -> int:
    """Dynamic shared memory of a block: table, levels of scales, `steps` of x and their sums, sums of two tiles."""
    rows, wide = rounded(rows), spread_of(scheme, config)
    table = (stream.TABLE_BYTES << config.wide if scheme.storage.levels else 0) + 1024 * (scheme.storage.scale == 3)
    sums = rows * (1 if scaled(wide, rows) else wide.spread)
    return table + 2 * rows * steps * wide.step + -(-steps * sums // 4) * 16 + 2 * config.warps * sums * 64 + 16


@lru_cache(maxsize=4096)
def slices(scheme: Scheme, config: Config, rows: int, columns: int) -> int:
    """Into how many slices of columns x is cut, so that `min_blocks` fit a multiprocessor; none is empty."""
    steps, room = columns // (scheme.step * config.spread), MOST_SHARED // config.min_blocks
    per_slice = max((n for n in range(1, steps + 1) if shared_bytes(scheme, config, rows, n) <= room), default=1)
    count = -(-steps // per_slice)
    return -(-steps // -(-steps // count))


def fits(scheme: Scheme, config: Config, rows: int) -> bool:
    """Whether the kernel can run it: few rows, and a step of x in shared memory."""
    wide = spread_of(scheme, config)
    if wide.spread > 1 and (scheme.steps_per_group != 1 or (scheme.storage.levels and scaled(wide, rows))):
        return False
    return rows <= MOST_ROWS and shared_bytes(scheme, config, rows, 1) * config.min_blocks <= MOST_SHARED


def takes(scheme: Scheme, config: Config, columns: int) -> bool:
    """Whether the kernel does what `Ends` say with one row: x lies whole, eight columns of it side by side."""
    return scheme.storage.bits in STRAIGHT and slices(scheme, config, 1, columns) == 1


def grid(
    config: Config, outs: Sequence[int], cuts: int, multiprocessors: int, gated: bool = False
) -> tuple[int, int, int]:
    """Blocks for weights of these `outs` in `cuts` slices: as many as stay at a time."""
    tiles = -(-outs[0] // 8) if gated else sum(-(-n // 16) for n in outs)
    return min(tiles, max(multiprocessors * config.min_blocks // cuts, 1)), cuts, 1


def params(operands: Sequence[Operands], scheme: Scheme, cuts: int, ends: Ends = PLAIN) -> ctypes.Structure:
    """The kernel's argument for weights that share x; `partial` and `arrived` are needed where there are cuts."""
    parts = [stream.params(each, scheme, cuts) for each in operands]
    array = (stream.Params * len(parts))(*parts)
    if ends.norm is None:
        return several(len(parts))(array)
    return several(len(parts), normed=True)(array, ends.norm.data_ptr(), ends.epsilon)


@lru_cache(maxsize=8)
def several(parts: int, normed: bool = False) -> type[ctypes.Structure]:
    """The type of the kernel's argument for that many weights."""
    norm = [("norm", ctypes.c_void_p), ("epsilon", ctypes.c_float)] if normed else []
    return type("Several", (ctypes.Structure,), {"_fields_": [("part", stream.Params * parts), *norm]})


def is_even(scheme: Scheme, config: Config, columns: int, cuts: int) -> bool:
    """Whether all warps have whole rounds of `ahead` steps, each step with a scale of its own."""
    wide, round_steps = spread_of(scheme, config), config.warps * config.ahead
    size, steps = SCALE_BYTES[scheme.storage.scale] * config.ahead * wide.spread, columns // wide.step
    return scheme.steps_per_group == 1 and not steps % (cuts * round_steps) and size in (4, 8, 16, 32)


def case_for(scheme: Scheme, config: Config, rows: int, columns: int) -> Case:
    """How few.cu is compiled for bfloat16 x (rows, columns) and one weight whose scales lie aligned."""
    even = is_even(scheme, config, columns, slices(scheme, config, rows, columns))
    return Case(half=False, rows=rounded(rows), even=even)


def case_of(operands: Sequence[Operands], scheme: Scheme, config: Config, cuts: int, ends: Ends = PLAIN) -> Case:
    """How few.cu is compiled for these."""
    x = operands[0].x
    even = is_even(scheme, config, x.shape[1], cuts) and all(scales_of(each).data_ptr() % 16 == 0 for each in operands)
    half, normed = x.dtype == torch.float16, 0 if ends.norm is None else x.shape[1]
    return Case(half, rounded(x.shape[0]), len(operands), even, normed, ends.gated, ends.onto)


def scales_of(operands: Operands) -> Tensor:
    """The scales as they are stored."""
    tensors = operands.packed.tensors
    return next(tensors[key] for key in ("scale", "absmax", "absmax_codes") if key in tensors)


@lru_cache(maxsize=512)
def build(scheme: Scheme, config: Config, case: Case, device: int) -> nvrtc.Function:
    """The compiled kernel on a device."""
    return nvrtc.build(SOURCE, macros(scheme, config, case), device)


def launch(
    operands: Sequence[Operands], scheme: Scheme, config: Config, cuts: int, multiprocessors: int, ends: Ends = PLAIN
) -> nvrtc.Launch:
    """What fills y of each; they have the same x, in `cuts` slices (`slices`), one where there are `ends` (`takes`)."""
    x = operands[0].x
    rows, columns = x.shape
    case = case_of(operands, scheme, config, cuts, ends)
    function = build(scheme, config, case, x.device.index)
    blocks = grid(config, [each.y.shape[1] for each in operands], cuts, multiprocessors, ends.gated)
    wide = spread_of(scheme, config)
    shared = shared_bytes(scheme, config, rows, -(-(columns // wide.step) // cuts))
    return function.cut(blocks, config.threads, shared, params(operands, wide, cuts, ends))
