"""Integers of 1, 3, 5, 6 and 7 bits in groups of 32 and 64 columns: a step of the kernels holds two or four groups."""

from __future__ import annotations

from functools import lru_cache

from whit.kernels.gpu import few, many, tiled, tuned
from whit.kernels.gpu.scales import storage
from whit.kernels.gpu.stream import Scheme
from whit.tensor import Format

STEP = 128  # columns of a step of codes that do not fill a word in twos, fours or eights, or of 1 bit
ROWS = 256  # up to which tiles are faster than dequantizing on Hopper


@lru_cache(maxsize=1024)
def scheme(format: Format, columns: int) -> Scheme | None:
    """How such codes are read, or None where a weight of so many columns has others."""
    stored, group = storage(format), format.group_size
    if isinstance(stored, str) or stored.levels or stored.bits not in (1, 3, 5, 6, 7) or group not in (32, 64):
        return None
    return None if columns % STEP else Scheme(stored, STEP // 4, 1, STEP // group)


@lru_cache(maxsize=1024)
def plan(
    scheme: Scheme, shape: tuple[int, int], rows: int, device: tuned.Device
) -> tuple[str, few.Config | many.Config | tiled.Config] | None:
    """The way for x (rows, columns) and a weight of `shape` (outs, columns), and its cut; None: dequantize.

    By what was fastest on an H100 (results/gpu_narrow.md).
    """
    if not few.scaled(scheme, rows):
        return "few", few.Config(8, 2, 2)
    if rows > 8 and (tiles := tuned.best_many(scheme, shape, rows, device)):
        return "many", tiles
    cut = few.Config(16, 2 if scheme.spread == 4 else 1, 1)
    if rows <= few.MOST_ROWS and few.slices(scheme, cut, rows, shape[1]) == 1:
        return "few", cut
    if rows <= 8:
        return "few", few.Config(8, 2, 2)
    if rows > ROWS or device[0] != tuned.HOPPER:
        return None
    return "tiled", tiled.fitted(tuned.hopper_tiled(scheme, shape, rows, device[1]), scheme, shape[1])
