"""How many.cu is cut for a weight: by what was measured of the nearest shape (tables_many.py, tables_runs.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from whit.kernels.gpu import many
from whit.kernels.gpu.near import nearest, rescaled
from whit.kernels.gpu.tables import Key, Shape

HEIGHTS = {8: (3, 8), 16: (3, 6), 32: (2, 4)}  # row tiles, with stages and pieces of x that have room


@dataclass(frozen=True)
class Weight:
    """What a cut depends on: the kind's name in a table, columns of a step, whether it has levels, a cut's meaning."""

    name: str
    step: int
    levels: bool
    config: Callable[[many.Cut], many.Config]


def best(
    weight: Weight, table: Mapping[Key, many.Cut | None], shape: Shape, rows: int, multiprocessors: int
) -> many.Config | None:
    """The cut for x (rows, columns) and a weight of `shape` (outs, columns); None: not measured, or another is faster.

    A shape takes what the nearest one has that was measured for the same kind of weight, with blocks for its own rows
    and as many of them.
    """
    near = nearest({where for known, _, where in table if known == weight.name}, shape)
    if near is None:
        return None
    known = sorted(most for other, most, where in table if (other, where) == (weight.name, near))
    measured_cut = table[weight.name, next((most for most in known if most >= rows), known[-1]), near]
    if measured_cut is None:
        return None
    config = weight.config(measured_cut)
    if found := filling(config, weight, shape, rows, near[0], multiprocessors):
        return found
    tiles = next(n for n in many.ROW_TILES if 8 * n >= min(rows, config.rows))
    split = 1 if config.split == 1 else rescaled(config.outs, config.split, near, shape)
    split = min(split, 8, max(shape[1] // weight.step, 1))
    most = [replace(config, row_tiles=tiles, split=n, apart=config.apart if n > 1 else 0) for n in range(split, 0, -1)]
    return next(cut for cut in most if cut.fits(weight.levels))


def filling(config: many.Config, weight: Weight, shape: Shape, rows: int, known: int, room: int) -> many.Config | None:
    """A cut for weights whose tiles, cut as was measured for `known` outs, would leave half of the device without work.

    Lower tiles, of which two blocks or more share the columns, are the fastest for 512 to 2,048 rows of 512 to 2,048
    outs (results/gpu_many.md). `room`: blocks that run at a time. None: the measured cut fills the device.
    """
    outs, columns = shape
    if rows <= 64 or 2 * config.tiles([outs], rows) > room or (config.split > 1 and outs >= known):
        return None
    most = min(columns // weight.step, 8)
    cuts = [weight.config((2, tiles, stages, 1, 1, 0, 1, lead)) for tiles, (stages, lead) in HEIGHTS.items()]
    for cut in cuts:
        count = cut.tiles([outs], rows)
        shared = replace(cut, split=max(min(max(room // (2 * count), 2), most), 1))
        if 2 * count <= room and shared.fits(weight.levels):
            return shared
    return next((cut for cut in cuts if cut.tiles([outs], rows) <= room and cut.fits(weight.levels)), None)
