"""The fused product for 9 rows and more on Hopper, of codes of 2 to 6 and 8 bits (many.cu says how)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from whit.kernels.gpu import maps, nvrtc, stream
from whit.kernels.gpu.scales import FLOAT_ZERO, Scales, scales, table
from whit.tensor import PackedWeight

SOURCE = Path(__file__).with_name("many.cu")
STEPS = {2: 512, 3: 256, 4: 256, 5: 128, 6: 128, 8: 128}  # bits of a code: columns of a tile
STEP_BYTES = 128  # of a row of a tile of codes, at most
ROW_TILES = (2, 4, 8, 16, 32)
LARGEST_SHARED = 227 << 10
MAP = ctypes.c_uint64 * 16
BOX_ROWS = BOX_OUTS = 64
BOX_BYTES = BOX_ROWS * BOX_OUTS * 2
Cut: TypeAlias = tuple[int, ...]
Map: TypeAlias = "ctypes.Array[ctypes.c_uint64]"
Mapped: TypeAlias = Callable[[int, int, int, int, int, int], Map]


@dataclass(frozen=True)
class Config:
    """How the work is cut; many.cu explains the names. `split` blocks share the columns of a tile.

    `lead` 0: as much of x as of the codes. `halve`: the last turn's tiles may be of half the height. `apart`: blocks
    that share columns are in no cluster; 2: each waits for the others, and adds up its part, which takes no longer only
    where all of them run at a time. `boxes`: of 64 rows of outs that four warps lay down, to be copied to y.
    """

    groups: int = 2
    row_tiles: int = 2
    stages: int = 6
    split: int = 1
    pair: int = 1
    late: int = 0
    min_blocks: int = 1
    lead: int = 0
    halve: int = 0
    apart: int = 0
    boxes: int = 0

    @property
    def values(self) -> Cut:
        """Its fields, as a table has them."""
        return (
            self.groups, self.row_tiles, self.stages, self.split, self.pair, self.late, self.min_blocks, self.lead,
            self.halve, self.apart, self.boxes,
        )  # fmt: skip

    @property
    def outs(self) -> int:
        return 64 * self.groups

    @property
    def rows(self) -> int:
        return 8 * self.row_tiles

    @property
    def stage_bytes(self) -> int:
        """Of a step of codes, and what is beside it."""
        return self.outs * STEP_BYTES

    @property
    def box(self) -> int:
        """Rows of x that are copied at once."""
        return self.rows // self.pair // (1 + self.halve)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.pair if self.apart else self.split * self.pair

    @property
    def counts(self) -> int:
        """Words in which the blocks of a tile count themselves where they are apart: one, or one for each warp."""
        return 4 * self.groups if self.apart == 2 else 1

    @property
    def threads(self) -> int:
        return 128 * self.groups + (128 if self.groups == 2 and self.min_blocks == 1 else 32)

    @property
    def pieces(self) -> int:
        """Pieces of 64 columns of x in shared memory."""
        return self.lead or 4 * self.stages

    def grid(self, outs: Sequence[int], rows: int, processors: int) -> nvrtc.Dims:
        """Blocks for weights of these `outs`: a cluster per tile, or as many as run at a time, which stay."""
        tiles = self.tiles(outs, rows) // self.pair
        if self.split > 1:
            return tiles * self.split * self.pair, 1, 1
        return min(tiles, max(processors * self.min_blocks // self.pair, 1)) * self.pair, 1, 1

    def tiles(self, outs: Sequence[int], rows: int) -> int:
        """Tiles of y, a block's each, of weights of these `outs`."""
        return -(-rows // self.rows) * sum(-(-n // (self.outs * self.pair)) for n in outs) * self.pair

    def for_outs(self, outs: Sequence[int]) -> Config:
        """Without boxes where rows of y would not begin at 16 bytes, as maps want it."""
        return replace(self, boxes=0) if any(n % 8 for n in outs) else self

    def shared_bytes(self, levels: bool) -> int:
        """Dynamic shared memory: 1,024 bytes with barriers, stages, what other blocks hand over, the table."""
        stages = self.stages * self.stage_bytes + self.pieces * self.rows * 128
        own = -(-self.row_tiles // 2 // self.split)  # pairs of tiles of rows
        handed = 0 if self.apart else (self.split - 1) * own * self.groups * 4096
        table = stream.TABLE_BYTES if levels else 0
        least = 1024 + stages + handed + table + self.groups * self.boxes * BOX_BYTES
        return least + table if self._has_room(least + table) else least

    def _has_room(self, shared: int) -> bool:
        return self.min_blocks * (shared + 1024) <= LARGEST_SHARED + 1024

    def fits(self, levels: bool) -> bool:
        """Whether its blocks' shared memory is there."""
        return self._has_room(self.shared_bytes(levels))

    def spaced(self, levels: bool) -> bool:
        """Whether there is room for a table of pairs of levels twice as long."""
        return levels and self.shared_bytes(True) - self.shared_bytes(False) > stream.TABLE_BYTES

    def macros(self, scheme: stream.Scheme, half: bool, parts: int = 1) -> dict[str, int]:
        """What many.cu is compiled with for so many weights."""
        return (
            scheme.storage.macros
            | self.cut_macros(bool(scheme.storage.levels), half, parts)
            | {"GROUP": group_of(scheme)}
        )

    def cut_macros(self, levels: bool, half: bool, parts: int) -> dict[str, int]:
        """Those of them that do not depend on the format, but for its having `levels`."""
        return {
            "HALF": int(half), "WG": self.groups, "NT": self.row_tiles, "STAGES": self.stages, "LEAD": self.pieces,
            "SPLITS": self.split, "PAIR": self.pair, "LATE": self.late, "MIN_BLOCKS": self.min_blocks,
            "MIXED": self.halve, "APART": self.apart, "OUT_BOXES": self.boxes,
            "SPACED": int(self.spaced(levels)), "PARTS": parts,
        }  # fmt: skip


class Weight(ctypes.Structure):
    """One of the weights, field by field as in many.cu."""

    _fields_ = (
        ("codes_map", MAP), ("scales", Scales), ("bias", ctypes.c_void_p), ("y", ctypes.c_void_p),
        ("outs", ctypes.c_int), ("rest", ctypes.c_int * 15),  # the map makes it a multiple of 64 bytes
    )  # fmt: skip


@lru_cache(maxsize=8)
def several(parts: int, weight: type[ctypes.Structure] = Weight) -> type[ctypes.Structure]:
    """The type of the kernel's argument for that many weights, field by field."""
    fields = (
        ("x_map", MAP), ("boxes", MAP * parts), ("part", weight * parts),
        *((name, ctypes.c_void_p) for name in ("table", "partial", "arrived")),
        ("columns", ctypes.c_int), ("rows", ctypes.c_int), ("rest", ctypes.c_int * 8),
    )  # fmt: skip
    return type("Several", (ctypes.Structure,), {"_fields_": fields})


@dataclass(frozen=True)
class Product:
    """A weight that is multiplied, with its bias, and contiguous y (rows, outs)."""

    packed: PackedWeight
    bias: Tensor | None
    y: Tensor


def why_not(scheme: stream.Scheme, columns: int) -> str | None:
    """Why the kernel cannot multiply such a weight, or None."""
    stored, group = scheme.storage, group_of(scheme)
    if stored.bits not in STEPS or stored.zero == FLOAT_ZERO:
        return f"codes are of {stored.bits} bits, or zero points are floats"
    if columns * stored.bits % 128 or (group not in (32, 64) and group % 128):
        return f"{columns} columns in groups of {group}"
    return None


def group_of(scheme: stream.Scheme) -> int:
    """Columns that share a scale; 0: the whole row."""
    return scheme.steps_per_group * scheme.step // scheme.spread


def step(scheme: stream.Scheme) -> int:
    """Columns of a tile of codes."""
    return STEPS[scheme.storage.bits]


@dataclass(frozen=True)
class Meeting:
    """Where blocks that share columns meet if they are apart: room for their sums; zeros in which they count."""

    partial: Tensor | None = None
    arrived: Tensor | None = None


NOWHERE = Meeting()


def meeting(x: Tensor, products: Sequence[Product], config: Config) -> Meeting:
    """Room for a product on x's device; a weight's own zeros where they are enough."""
    if not config.apart:
        return NOWHERE
    tiles = config.grid([one.y.shape[1] for one in products], len(x), 1)[0] // config.split
    sums = torch.empty(tiles * config.split * config.rows * config.outs, dtype=torch.float32, device=x.device)
    arrived, counts = products[0].packed.tensors.get("arrived"), tiles * config.counts
    if arrived is None or len(arrived) < counts:
        arrived = torch.zeros(counts, dtype=torch.int32, device=x.device)
    return Meeting(sums, arrived)


def params(
    x: Tensor, products: Sequence[Product], scheme: stream.Scheme, config: Config, mapped: Mapped = maps.tiles_of,
    room: Meeting = NOWHERE,
) -> ctypes.Structure:  # fmt: skip
    """The kernel's argument; it borrows the tensors' memory."""
    (rows, columns), stored = x.shape, scheme.storage
    levels = table(stored.levels, x.dtype, x.device) if stored.levels else None
    row_bytes, wide = columns * stored.bits // 8, step(scheme) * stored.bits // 8
    parts = [
        Weight(
            mapped(one.packed.tensors["codes"].data_ptr(), one.y.shape[1], row_bytes, config.outs, wide, 1),
            scales(one.packed, stored),
            None if one.bias is None else one.bias.data_ptr(),
            one.y.data_ptr(),
            one.y.shape[1],
        )
        for one in products
    ]
    return several(len(parts))(
        mapped(x.data_ptr(), rows, columns, config.box, 64, 2),
        maps_of_outs(products, config, mapped),
        (Weight * len(parts))(*parts),
        None if levels is None else levels.data_ptr(),
        None if room.partial is None else room.partial.data_ptr(),
        None if room.arrived is None else room.arrived.data_ptr(),
        columns, rows,
    )  # fmt: skip


def maps_of_outs(products: Sequence[Product], config: Config, mapped: Mapped = maps.tiles_of) -> ctypes.Array[Map]:
    """Where boxes of each y are copied to; zeros where there are no boxes."""
    every = [one.y for one in products if config.boxes]
    found: ctypes.Array[Map] = (MAP * len(products))(
        *(mapped(y.data_ptr(), len(y), y.shape[1], BOX_ROWS, BOX_OUTS, 2) for y in every)
    )
    return found


@lru_cache(maxsize=512)
def build(scheme: stream.Scheme, config: Config, half: bool, parts: int, device: int) -> nvrtc.Function:
    """The compiled kernel on a device."""
    return nvrtc.build(SOURCE, config.macros(scheme, half, parts), device)


def launch(
    x: Tensor, products: Sequence[Product], scheme: stream.Scheme, config: Config, multiprocessors: int,
    room: Meeting,
) -> nvrtc.Launch:  # fmt: skip
    """What fills y of each from contiguous x (rows, columns), which begins at 16 bytes; `room` is `meeting`'s."""
    function = build(scheme, config, x.dtype == torch.float16, len(products), x.device.index)
    grid = config.grid([one.y.shape[1] for one in products], len(x), multiprocessors)
    argument = params(x, products, scheme, config, room=room)
    shared = config.shared_bytes(bool(scheme.storage.levels))
    return function.cut(grid, config.threads, shared, argument, config.cluster)
