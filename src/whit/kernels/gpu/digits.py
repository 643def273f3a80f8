"""One row through codes of 2 to 4 bits on Hopper: x in digits on the integer tensor cores (digits.cu says how)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.scales import NESTED, NO_ZERO
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

SOURCE = Path(__file__).with_name("digits.cu")
SPAN, STEP, OUTS = 512, 64, 16  # columns of a warp and of a step, outs of a tile
HALF_SHARED = (228 << 10) // 2 - 1024  # so that two blocks fit a multiprocessor
SCALE_BYTES = (2, 2, 4)  # by the storage of a scale
DIGITS = 16 * (32 + 4) * 4  # bytes of a warp's x


@dataclass(frozen=True)
class Config:
    """How the work is to be cut; digits.cu explains the names. At most so many `warps` and `stages`; `blocks` of a
    multiprocessor."""

    warps: int = 8
    each: int = 1
    stages: int = 6
    blocks: int = 1


@dataclass(frozen=True)
class Cut:
    """How the weights of one launch are cut. `clusters`: of `splits` blocks each."""

    warps: int
    each: int
    splits: int
    stages: int
    clusters: int
    most: int

    @property
    def held(self) -> int:
        """Bytes of `Shared` in digits.cu, and of x where it stays."""
        sums = 4 * OUTS * self.most * (self.warps + self.splits) + 16 * self.stages + 16
        return -(-sums // 16) * 16 + (self.warps * self.each * DIGITS if self.each > 1 else 0)


class Part(ctypes.Structure):
    """A weight, field by field as in digits.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "bias", "y")),
        *((name, ctypes.c_int) for name in ("outs", "tiles")),
    )  # fmt: skip


@lru_cache(maxsize=8)
def several(parts: int) -> type[ctypes.Structure]:
    """The type of the kernel's argument for that many weights."""
    fields = (("part", Part * parts), ("x", ctypes.c_void_p), ("columns", ctypes.c_int), ("tiles", ctypes.c_int))
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


def group_steps(scheme: Scheme) -> int | None:
    """Steps of 64 columns that share a scale: 1, 2 or 4; 0 where the whole row does; None for other numbers."""
    steps, rest = divmod(scheme.steps_per_group * scheme.step, STEP)
    return steps if not rest and steps in (0, 1, 2, 4) else None


def why_not(scheme: Scheme, columns: int) -> str | None:
    """Why the kernel cannot multiply weights of this scheme, or None; they must lie aligned, too (`slab.aligned`)."""
    stored, steps = scheme.storage, group_steps(scheme)
    plain = stored.bits in (2, 3, 4) and not stored.levels and stored.zero == NO_ZERO and stored.scale != NESTED
    if not plain:
        return "codes are not integers of 2 to 4 bits, or have zero points"
    if steps is None:
        return "groups are of other than 64, 128 or 256 columns"
    return f"{columns} columns are not a multiple of {SPAN}" if columns % SPAN else None


@lru_cache(maxsize=1024)
def fit(scheme: Scheme, config: Config, columns: int, tiles: int, multiprocessors: int) -> Cut | None:
    """The cut for so many `tiles` of 16 outs, whose blocks take half of a multiprocessor; None where there is none."""
    spans = columns // SPAN // config.each
    splits = next((n for n in range(1, 9) if spans and not spans % n and spans // n <= config.warps), None)
    if splits is None or columns % (SPAN * config.each):
        return None
    clusters = min(tiles, max(multiprocessors * config.blocks // splits, 1))
    most = -(-tiles // (8 * clusters)) * 8
    cut = Cut(spans // splits, config.each, splits, config.stages, clusters, most)
    stages = min((HALF_SHARED - cut.held) // slot_bytes(scheme, cut), config.stages)
    slice_bytes, row_bytes = scale_bytes(scheme, cut.warps * SPAN), scale_bytes(scheme, columns)
    return None if stages < 2 or slice_bytes % 8 or row_bytes % 16 else replace(cut, stages=stages)


def scale_bytes(scheme: Scheme, columns: int) -> int:
    """Of the scales of so many columns of a row that are copied with its codes; 0 where it has one."""
    steps = group_steps(scheme)
    return columns // (STEP * steps) * SCALE_BYTES[scheme.storage.scale] if steps else 0


def tiles_of(packed: Sequence[PackedWeight]) -> int:
    """Sixteens of outs of weights that share a launch."""
    return sum(-(-weight.shape[0] // OUTS) for weight in packed)


def macros(scheme: Scheme, cut: Cut, half: bool, parts: int = 1) -> dict[str, int]:
    """What digits.cu is compiled with."""
    return scheme.storage.macros | {
        "HALF": int(half), "STEPS_PER_GROUP": group_steps(scheme) or 0, "WARPS": cut.warps, "EACH": cut.each,
        "SPLITS": cut.splits, "STAGES": cut.stages, "MOST": cut.most, "PARTS": parts,
    }  # fmt: skip


def slot_bytes(scheme: Scheme, cut: Cut) -> int:
    """Of a tile in shared memory, or of all warps' x."""
    columns = cut.warps * SPAN
    row = columns * scheme.storage.bits // 8 + -(-scale_bytes(scheme, columns) // 16) * 16 + 32
    return max(OUTS * row, cut.warps * DIGITS if cut.each == 1 else 0)


def params(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None], ys: Sequence[Tensor]
) -> ctypes.Structure:
    """The kernel's argument; it borrows the tensors' memory."""
    parts = []
    for weight, bias, y in zip(packed, biases, ys, strict=True):
        tensors = weight.tensors["codes"], weight.tensors["scale"], bias, y
        places = [None if t is None else t.data_ptr() for t in tensors]
        parts.append(Part(*places, weight.shape[0], -(-weight.shape[0] // OUTS)))
    return several(len(parts))((Part * len(parts))(*parts), x.data_ptr(), x.shape[1], tiles_of(packed))


@lru_cache(maxsize=64)
def _build(scheme: Scheme, cut: Cut, half: bool, parts: int, device: int) -> nvrtc.Function:
    return nvrtc.build(SOURCE, macros(scheme, cut, half, parts), device)


def launch(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None], ys: Sequence[Tensor], scheme: Scheme,
    cut: Cut,
) -> nvrtc.Launch:  # fmt: skip
    """What fills ys (1, outs) from contiguous x (1, columns), which begins at 16 bytes; weights of one scheme."""
    function = _build(scheme, cut, x.dtype == torch.float16, len(packed), x.device.index)
    shared = cut.held + cut.stages * slot_bytes(scheme, cut)
    grid = cut.clusters * cut.splits, 1, 1
    argument = params(x, packed, biases, ys)
    return function.cut(grid, 32 * (cut.warps + 1), shared, argument, cut.splits)
