"""The fused product for up to 16 rows of codes of 2, 3, 4 and 8 bits on Hopper: blocks beside each other.

slab.cu says how.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import halves, maps, nvrtc, stream
from whit.kernels.gpu.many import Mapped, Product, Weight
from whit.kernels.gpu.scales import NO_ZERO, PACKED_ZERO, scales, table
from whit.tensor import PackedWeight

SOURCE = Path(__file__).with_name("slab.cu")
MOST_ROWS = 16
SPAN = 256  # columns of a box
BITS = (2, 3, 4, 8)
LARGEST_CHUNK = 32  # columns that a thread holds of a step
LEAST_COPY = 4  # bytes that one instruction copies to shared memory
LARGEST_SHARED = 227 << 10
MULTIPROCESSOR = 228 << 10  # bytes of shared memory, of which each block takes 1,024 more than it asks for
SCALE_BYTES = (2, 2, 4, 1)  # by the storage of a scale


@dataclass(frozen=True)
class Config:
    """How the work is cut; slab.cu explains the names."""

    outs: int = 128
    across: int = 4
    along: int = 2
    stages: int = 1
    splits: int = 4
    blocks: int = 2
    late: int = 0
    mixed: int = 0
    deep: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.across * self.along

    def grid(self, *outs: int) -> nvrtc.Dims:
        """A cluster per tile of each weight."""
        return sum(-(-each // self.outs) for each in outs) * self.splits, 1, 1

    def shared_bytes(self, scheme: stream.Scheme, rows: int) -> int:
        """Dynamic shared memory of a block, as slab.cu lays it out."""
        stored = scheme.storage
        row = SPAN * stored.bits // 8 + scale_bytes(scheme) + 4 * (stored.scale == 3) + 4 * (stored.zero != NO_ZERO)
        slot = self.outs * row + rounded(rows) * SPAN * 2 + 16
        levels = (stream.TABLE_BYTES if stored.levels else 0) + 1024 * (stored.scale == 3)
        levels += 0 if in_groups(scheme).steps_per_group else 4 * self.outs
        share = -(-self.outs // 4 // self.splits) * 4  # as many outs of each block's sums lie in each of a cluster
        inbox = 4 * self.splits * rounded(rows) * share + 16 if self.splits > 1 else 0
        # shared memory begins at a multiple of 1,024
        return self.across * self.stages * slot + levels + inbox

    def fits(self, scheme: stream.Scheme, rows: int) -> bool:
        """Whether so many blocks' shared memory is there."""
        return self.blocks * (self.shared_bytes(scheme, rows) + 1024) <= MULTIPROCESSOR

    def macros(self, scheme: stream.Scheme, half: bool, rows: int, weights: int = 1) -> dict[str, int]:
        """What slab.cu is compiled with."""
        read = in_groups(scheme)
        return scheme.storage.macros | {
            "HALF": int(half), "CHUNK": read.chunk, "STEPS_PER_GROUP": read.steps_per_group,
            "ROWS": rounded(rows), "OUTS": self.outs, "ACROSS": self.across, "ALONG": self.along,
            "STAGES": self.stages, "SPLITS": self.splits, "LATE": self.late, "MIXED": self.mixed,
            "WEIGHTS": weights, "DEEP": self.deep,
            "BLOCKS": self.blocks, "BEGINS": 1024, "MIN_BLOCKS": self.blocks, "NT": 2, "WG": 1,
        }  # fmt: skip


@lru_cache(maxsize=8)
def several(weights: int) -> type[ctypes.Structure]:
    """The type of the kernel's argument for that many weights, field by field as in slab.cu."""
    fields = (
        ("x_map", ctypes.c_uint64 * 16), ("weights", Weight * weights), ("table", ctypes.c_void_p),
        ("columns", ctypes.c_int), ("rows", ctypes.c_int), ("rest", ctypes.c_int * 12),
    )  # fmt: skip
    return type("Several", (ctypes.Structure,), {"_fields_": fields})


def rounded(rows: int) -> int:
    """Rows that the kernel is built for: 8 or 16."""
    return 8 if rows <= 8 else MOST_ROWS


def in_groups(scheme: stream.Scheme) -> stream.Scheme:
    """The scheme in steps that have a scale each, as far as registers for x go; whole rows in steps of 128 columns."""
    chunk, steps = scheme.chunk, scheme.steps_per_group
    while chunk > LARGEST_CHUNK and not steps:
        chunk //= 2
    if chunk < LARGEST_CHUNK and steps in (0, LARGEST_CHUNK // chunk):
        chunk, steps = LARGEST_CHUNK, min(steps, 1)
    return replace(scheme, chunk=chunk, steps_per_group=steps)


def scale_bytes(scheme: stream.Scheme) -> int:
    """Of an out's scales in a box."""
    read = in_groups(scheme)
    return SPAN // read.step * SCALE_BYTES[read.storage.scale] if read.steps_per_group else 0


def why_not(scheme: stream.Scheme, columns: int) -> str | None:
    """Why the kernel cannot multiply such a weight, or None."""
    stored, read = scheme.storage, in_groups(scheme)
    if stored.bits not in BITS or not zeros_fit(read, columns):
        return f"codes are not of {BITS} bits, or zero points not packed in words of 32 bits"
    if read.steps_per_group > 1 or read.chunk > LARGEST_CHUNK or 0 < scale_bytes(scheme) < LEAST_COPY:
        return f"groups are of {scheme.step * scheme.steps_per_group}, of other than 32, 64 or 128 or with small scales"
    return f"{columns} columns are not a multiple of {SPAN}" if columns % SPAN else None


def zeros_fit(read: stream.Scheme, columns: int) -> bool:
    """Whether there are no zero points, or those of a row fill whole words, and one word holds those of a box."""
    if read.storage.zero == NO_ZERO:
        return True
    bits = SPAN // read.step * read.storage.bits
    return read.storage.zero == PACKED_ZERO and 32 % bits == 0 and columns // read.step * read.storage.bits % 32 == 0


def aligned(packed: PackedWeight) -> bool:
    """Whether the scales of a row's box can be copied at once: its tensors begin at 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in packed.tensors.values())


def params(
    x: Tensor, products: Sequence[Product], scheme: stream.Scheme, config: Config, mapped: Mapped = maps.tiles_of
) -> ctypes.Structure:
    """The kernel's argument; it borrows the tensors' memory."""
    (rows, columns), stored = x.shape, scheme.storage
    levels = table(stored.levels, x.dtype, x.device) if stored.levels else None
    width, found = min(SPAN * stored.bits // 8, 128), []
    for one in products:
        outs, packed = one.y.shape[1], one.packed
        codes = mapped(packed.tensors["codes"].data_ptr(), outs, columns // 8 * stored.bits, config.outs, width, 1)
        of_codes = halves.scales(packed) if halves.reads_halves(scheme) else scales(packed, stored)
        bias = None if one.bias is None else one.bias.data_ptr()
        found.append(Weight(codes, of_codes, bias, one.y.data_ptr(), outs))
    kind = several(len(found))
    return kind(
        x_map=mapped(x.data_ptr(), rows, columns, rounded(rows), 64, 2), weights=(Weight * len(found))(*found),
        table=None if levels is None else levels.data_ptr(), columns=columns, rows=rows,
    )  # fmt: skip


@lru_cache(maxsize=512)
def build(scheme: stream.Scheme, config: Config, half: bool, rows: int, weights: int, device: int) -> nvrtc.Function:
    """The compiled kernel on a device."""
    return nvrtc.build(SOURCE, config.macros(scheme, half, rows, weights), device)


def launch(x: Tensor, products: Sequence[Product], scheme: stream.Scheme, config: Config) -> nvrtc.Launch:
    """What fills each y from contiguous x (rows, columns), which begins at 16 bytes; weights of one scheme."""
    rows = len(x)
    function = build(scheme, config, x.dtype == torch.float16, rounded(rows), len(products), x.device.index)
    grid, shared = config.grid(*(one.y.shape[1] for one in products)), config.shared_bytes(scheme, rows)
    argument = params(x, products, scheme, config)
    return function.cut(grid, config.threads, shared, argument, config.splits)
