"""Integers of 1, 3, 5, 6 and 7 bits in groups of 32 and 64 columns: a step of the kernels holds two or four groups."""

from __future__ import annotations

from functools import lru_cache

from whit.kernels.gpu import few, tiled
from whit.kernels.gpu.scales import storage
from whit.kernels.gpu.stream import Scheme
from whit.tensor import Format

STEP = 128  # columns of a step of codes that do not fill a word in twos, fours or eights, or of 1 bit
ROWS = 64  # up to which no other way was measured to be faster
LEAST_STEPS = 8  # of a split: with fewer the sums cost more than the columns


@lru_cache(maxsize=1024)
def scheme(format: Format, columns: int) -> Scheme | None:
    """How such codes are read, or None where a weight of so many columns has others."""
    stored, group = storage(format), format.group_size
    if isinstance(stored, str) or stored.levels or stored.bits not in (1, 3, 5, 6, 7) or group not in (32, 64):
        return None
    return None if columns % STEP else Scheme(stored, STEP // 4, 1, STEP // group)


@lru_cache(maxsize=1024)
def plan(
    scheme: Scheme, shape: tuple[int, int], rows: int, multiprocessors: int
) -> tuple[str, few.Config | tiled.Config] | None:
    """The way for x (rows, columns) and a weight of `shape` (outs, columns), and its cut; None: dequantize.

    By what was fastest on an H100 (results/gpu_narrow.md).
    """
    outs, columns = shape
    if not few.scaled(scheme, rows):
        return "few", few.Config(8, 2, 2)
    cut = few.Config(16, 2 if scheme.spread == 4 else 1, 1)
    if rows <= few.MOST_ROWS and few.slices(scheme, cut, rows, columns) == 1:
        return "few", cut
    if rows <= 8:
        return "few", few.Config(8, 2, 2)
    return None if rows > ROWS else ("tiled", _tiled(outs, columns // STEP, rows, multiprocessors))


def _tiled(outs: int, steps: int, rows: int, multiprocessors: int) -> tiled.Config:
    """Two blocks to a multiprocessor, and splits of the columns to fill them."""
    row_tiles, room = 2 if rows <= 16 else 4 if rows <= 32 else 8, 2 * multiprocessors
    if rows <= 32:
        splits = min(room // -(-outs // 128), steps // LEAST_STEPS)
        return tiled.Config(1, 2, row_tiles, 2, 3, max(splits, 1), 2)
    blocks = -(-outs // 64)
    if blocks > room:
        return tiled.Config(1, 4, row_tiles, 2, 4, 1, 1)
    return tiled.Config(1, 1, row_tiles, 2, 4, max(min(room // blocks, steps // LEAST_STEPS), 1), 2)
