"""How many.cu is cut for a weight: by what was measured of the nearest shape (tables_many.py, tables_runs.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from whit.kernels.gpu import many
from whit.kernels.gpu.near import nearest, rescaled
from whit.kernels.gpu.tables import Key, Shape

Filling: TypeAlias = "Callable[[Weight, Shape, int, int], many.Config | None]"
HEIGHTS = {8: (3, 8), 16: (3, 6), 32: (2, 4)}  # row tiles, with stages and pieces of x that have room


@dataclass(frozen=True)
class Weight:
    """What a cut depends on: the kind's name in a table, columns of a step, whether it has levels, a cut's meaning.

    `filling`: the cut of a weight whose tiles as measured would leave half of the device without work.
    """

    name: str
    step: int
    levels: bool
    config: Callable[[many.Cut], many.Config]
    filling: Filling


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
    idle = rows > 32 and 2 * config.tiles([shape[0]], rows) <= multiprocessors
    fewer = shape[0] < near[0] // (2 if config.apart == 2 else 1)
    if idle and (config.split == 1 or fewer) and (found := weight.filling(weight, shape, rows, multiprocessors)):
        return found
    tiles = next(n for n in many.ROW_TILES if 8 * n >= min(rows, config.rows))
    split = 1 if config.split == 1 else rescaled(config.outs, config.split, near, shape)
    split = min(split, 8, max(shape[1] // weight.step, 1))
    config = replace(config, row_tiles=tiles, boxes=min(config.boxes, tiles // 8))
    most = [replace(config, split=n, apart=config.apart if n > 1 else 0) for n in range(split, 0, -1)]
    return next(cut for cut in most if cut.fits(weight.levels) and _runs_at_once(cut, shape[0], rows, multiprocessors))


def _runs_at_once(cut: many.Config, outs: int, rows: int, multiprocessors: int) -> bool:
    """Whether no block waits for one that has not begun, where blocks wait for each other."""
    return cut.apart != 2 or cut.grid([outs], rows, multiprocessors)[0] <= multiprocessors * cut.min_blocks


def lower_tiles(weight: Weight, shape: Shape, rows: int, room: int) -> many.Config | None:
    """Lower tiles, of which two blocks or more share the columns; `room`: blocks that run at a time.

    The fastest of ggml's types for 512 to 2,048 rows of 512 to 2,048 outs (results/runs_gpu.md).
    """
    outs, columns = shape
    if rows <= 64:
        return None
    most = min(columns // weight.step, 8)
    cuts = [weight.config((2, tiles, stages, 1, 1, 0, 1, lead)) for tiles, (stages, lead) in HEIGHTS.items()]
    for cut in cuts:
        count = cut.tiles([outs], rows)
        shared = replace(cut, split=max(min(max(room // (2 * count), 2), most), 1))
        if 2 * count <= room and shared.fits(weight.levels):
            return shared
    return next((cut for cut in cuts if cut.tiles([outs], rows) <= room and cut.fits(weight.levels)), None)


def taller_or_shared(bits: int) -> Filling:
    """For codes of so many bits: tall tiles of 64 outs where there are enough of them, else columns are shared.

    By what was fastest for 64 to 2,048 rows of 512 to 2,048 outs (results/gpu_many.md): blocks share the columns of
    smaller tiles; four or eight wait for each other and add up a part each, where that many run at a time.
    """

    def filling(weight: Weight, shape: Shape, rows: int, room: int) -> many.Config | None:
        outs, columns = shape
        small = many.Config(1, 8 if rows <= 64 else 16, 3, lead=8, apart=2)
        for split in (8, 4):
            if split * small.tiles([outs], rows) <= room and split * weight.step <= columns:
                return replace(small, split=split)
        if rows <= 64:
            return None
        tall = many.Config(1, 32, 3 if bits <= 4 else 4, lead=4, boxes=3)
        if 2 * tall.tiles([outs], rows) > room:
            return tall
        stages, lead = (2, 8) if bits <= 4 and not weight.levels else (3, 6)
        pairs = many.Config(2, 16, stages, 2, lead=lead), many.Config(1, 16, 3, 2, lead=8)
        count = {cut: cut.grid([outs], rows, room)[0] for cut in pairs}
        cut = max((cut for cut in pairs if count[cut] <= room), key=count.__getitem__, default=pairs[0])
        return replace(cut, split=min(cut.split, max(columns // weight.step, 1)))

    return filling
