"""Which kernel and which configuration runs what: measured where it was measured, a rule of thumb elsewhere.

Nothing is tuned at import: benchmarks/gpu_kernels.py --tune and --tune-tiled print rows of tables.py. Another shape
takes the configuration of the nearest one that was measured, with as many blocks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from whit.kernels.gpu import digits, few, halves, many, many_cuts, slab, stream, tiled
from whit.kernels.gpu.near import measured, nearest, rescaled
from whit.kernels.gpu.stream import Config, Scheme, row_tiles
from whit.kernels.gpu.tables import ROUTES, STREAM, TILED, Route, Shape
from whit.kernels.gpu.tables_few import DIGITS, FEW
from whit.kernels.gpu.tables_many import INVARIANT_MANY, MANY
from whit.kernels.gpu.tables_slab import SHARED, SLAB

BYTES_AHEAD = 32  # that a thread loads of each row before it computes
MOST_COLUMNS = 640  # of 64 rows of x, twice, that fit in shared memory beside a table of levels
ROW_CLASSES = (16, 32, 64, 128, 256, 1024)  # rows for which a configuration of the tiled kernel is measured
HOPPER = 9  # of a compute capability, the major
SPLIT_COLUMNS = 1024  # of a split of tiled.cu: with fewer its sums cost more than its columns
Device = tuple[int, int]  # the compute capability's major and the number of multiprocessors
DEFAULT_ROUTE: Route = ((16, "stream"), (128, "tiled"))


def kind(scheme: Scheme) -> str:
    """What decides the work per weight: the codes, how many of them share a scale, zero points."""
    stored = scheme.storage
    name = "table" if stored.levels else f"int{stored.bits}"
    read = "-dq" if stored.scale == 3 else halves.KIND if halves.reads_halves(scheme) else ""
    return f"{name}-{scheme.step}" + ("-zero" if stored.zero else "") + read


def route(scheme: Scheme, shape: Shape, rows: int, device: Device) -> str:
    """Which of `stream`, `tiled` and `dequantize` (and multiply) is fastest for a weight of `shape` (outs, columns)."""
    table, name = ROUTES.get(device[0], {}), kind(scheme).removesuffix("-dq")
    near = nearest([where for known, where in table if known == name], shape)
    steps = DEFAULT_ROUTE if near is None else table[name, near]
    return next((way for most, way in steps if rows <= most), "dequantize")


def best(scheme: Scheme, shape: Shape, rows: int, device: Device, invariant: bool = False) -> Config:
    """The streaming configuration for x (rows, columns) times a weight of `shape` (outs, columns).

    An invariant one does not depend on the rows in anything that changes a row's sums.
    """
    tiles = row_tiles(rows)
    table = {} if invariant else STREAM.get(device[0], {})
    near = nearest(measured(table, kind(scheme), tiles), shape)
    if near is None:
        return default(scheme, shape, tiles, device[1])
    config = Config(*table[kind(scheme), tiles, near])
    return replace(config, splits=rescaled(config.outs, config.splits, near, shape))


def best_few(scheme: Scheme, shape: Shape, rows: int, device: Device) -> few.Config | None:
    """The configuration of the kernel for up to 16 rows; None where another is faster."""
    if rows > few.MOST_ROWS:
        return None
    table, name = FEW.get(device[0], {}), kind(scheme)
    of = min((most for known, most, _ in table if known == name and most >= rows), default=0)
    near = nearest(measured(table, name, of), shape)
    config = few.Config(*table[name, of, near]) if near else default_few(scheme, rows)
    if not few.fits(scheme, config, rows) or (rows > 8 and few.slices(scheme, config, rows, shape[1]) > 1):
        return None  # what x in slices costs is more than tiles do
    return config


@lru_cache(maxsize=1024)
def best_digits(scheme: Scheme, shape: Shape, device: Device) -> digits.Config | None:
    """The configuration of Hopper's kernel for one row; None where another is faster, or it was not measured."""
    table, name = DIGITS.get(device[0], {}), kind(scheme)
    near = nearest({where for known, where in table if known == name}, shape)
    found = near and table[name, near]
    return digits.Config(*found) if found and digits.why_not(scheme, shape[1]) is None else None


def best_slab(scheme: Scheme, shape: Shape, rows: int, device: Device, shared: bool = False) -> slab.Config | None:
    """The configuration of Hopper's kernel for up to 16 rows; None where another is faster, or it was not measured.

    A shape takes what the nearest one has that was measured for the same kind of weight, with about as many blocks.
    `shared`: of several weights that share an input, with all their outs.
    """
    table, name = (SHARED if shared else SLAB).get(device[0], {}), kind(slab.in_groups(scheme))
    near = nearest({where for known, _, where in table if known == name}, shape)
    if near is None or rows > slab.MOST_ROWS or slab.why_not(scheme, shape[1]) is not None:
        return None
    found = [most for known, most, where in table if (known, where) == (name, near) and most >= rows]
    cut = table[name, min(found), near] if found else None
    if cut is None:
        return None
    config = slab.Config(*cut)
    splits = min(rescaled(config.outs, config.splits, near, shape), 8, shape[1] // (slab.SPAN * config.across))
    config = replace(config, splits=max(splits, 1))
    return config if config.fits(scheme, rows) else None


def reads_halves(scheme: Scheme, shape: Shape, major: int) -> bool:
    """Whether products of such a weight of `shape` read its absmax in 16 bits on devices of that compute capability."""
    table, name = SLAB.get(major, {}), kind(scheme)
    near = nearest({where for known, _, where in table if known == name}, shape)
    known = {(other, where) for other, _, where in table}
    return (name + halves.KIND, near) in known and slab.why_not(scheme, shape[1]) is None


def best_many(scheme: Scheme, shape: Shape, rows: int, device: Device) -> many.Config | None:
    """The configuration of Hopper's kernel for more rows; None where another is faster, or it was not measured."""
    if many.why_not(scheme, shape[1]) is not None:
        return None
    name, levels = kind(scheme).removesuffix("-dq"), bool(scheme.storage.levels)
    weight = many_cuts.Weight(
        name, many.step(scheme), levels, lambda cut: many.Config(*cut), many_cuts.taller_or_shared(scheme.storage.bits)
    )
    return many_cuts.best(weight, MANY.get(device[0], {}), shape, rows, device[1])


def best_invariant(scheme: Scheme, shape: Shape, rows: int, device: Device) -> many.Config | None:
    """The invariant configuration of Hopper's kernel for more rows, which then takes all; None where it does not."""
    if kind(scheme).removesuffix("-dq") not in INVARIANT_MANY.get(device[0], ()):
        return None
    return invariant_many(scheme, shape, rows, device) if many.why_not(scheme, shape[1]) is None else None


def invariant_many(scheme: Scheme, shape: Shape, rows: int, device: Device) -> many.Config:
    """A cut in which a row's sums do not depend on the rows: only the height of the tiles and the stages do.

    Blocks share the columns of a tile where the tiles of one height would leave most multiprocessors without work.
    """
    split, blocks = 1, -(-shape[0] // many.Config(2).outs)
    while split < 8 and 3 * split * blocks <= device[1] and 2 * split * many.step(scheme) <= shape[1]:
        split *= 2
    highest = many.ROW_TILES[-1] if split == 1 else 16  # sums of taller tiles take long to lay down
    tiles = next((n for n in many.ROW_TILES if 8 * n >= rows), highest)
    tiles = min(tiles, highest)
    stages, lead = (4, 16) if tiles <= 2 else (3, 8) if tiles <= 8 else (2, 6) if tiles <= 16 else (2, 4)
    if scheme.storage.bits > 4:
        stages *= 2  # of half as many columns
    return many.Config(2, tiles, stages, split, lead=lead)


def default_few(scheme: Scheme, rows: int) -> few.Config:
    """Two blocks of eight warps, or one of sixteen where x takes room; four steps ahead where they are small."""
    ahead = 2 if scheme.chunk * scheme.storage.bits >= 128 else 4
    return few.Config(8, ahead, 2) if rows <= 4 else few.Config(16, ahead, 1)


def best_tiled(scheme: Scheme, shape: Shape, rows: int, device: Device) -> tiled.Config:
    """The tiled kernel's configuration."""
    table, of = TILED.get(device[0], {}), row_class(rows)
    near = nearest(measured(table, kind(scheme), of), shape)
    if near is None and device[0] == HOPPER:
        return hopper_tiled(scheme, shape, rows, device[1])
    if near is None:
        return default_tiled(scheme, shape, rows, device)
    config = tiled.Config(*table[kind(scheme), of, near])
    return replace(config, splits=rescaled(config.outs, config.splits, near, shape))


def row_class(rows: int) -> int:
    """The rows that were measured for these."""
    return next((most for most in ROW_CLASSES if rows <= most), ROW_CLASSES[-1])


def default(scheme: Scheme, shape: Shape, tiles: int, multiprocessors: int) -> Config:
    """32 bytes ahead per row, four warps along outs and two along columns, enough splits for three blocks each.

    What changes the order of a sum (warps along columns, depth, splits) does not depend on the tiles of rows.
    """
    ahead = max(BYTES_AHEAD * 8 // (scheme.chunk * scheme.storage.bits), 1)
    depth = max(min(ahead, MOST_COLUMNS // (2 * scheme.step)), 1)
    outs, columns = shape
    blocks, stages = -(-outs // 64), columns // scheme.step // (2 * depth)
    splits = max(min(3 * multiprocessors // blocks, stages // 2, 16), 1)
    return stream.Config(1, 4, 2, depth, splits, 2 if tiles <= 2 else 1)


def hopper_tiled(scheme: Scheme, shape: Shape, rows: int, multiprocessors: int) -> tiled.Config:
    """By what was fastest on an H100 for integers of 2, 3, 5, 6 and 8 bits: up to 32 rows two small blocks to a
    multiprocessor, beyond one of 128 outs; splits to fill it, of no fewer than 1,024 columns."""
    (outs, columns), most = shape, min(tiled.STAGE_COLUMNS // scheme.step, tiled.MOST_TILES)
    tiles = next(n for n in tiled.ROW_TILES if 8 * n >= rows or n >= most)
    few_columns = max(columns // SPLIT_COLUMNS, 1)
    if -(-outs // 64) > 2 * multiprocessors and tiles <= 8:
        return tiled.Config(1, 4, tiles, 2, 4 if scheme.step <= 128 else 3)
    turns = 2 if scheme.step < 256 and tiles <= 8 else 1
    wanted = turns * multiprocessors // (-(-outs // 128) * -(-rows // (8 * tiles)))
    if tiles <= 4 or (turns == 2 and wanted > few_columns):
        splits = min(4 * multiprocessors // -(-outs // 64), few_columns)
        return tiled.Config(1, 1, tiles, 2, 4, max(splits, 1), 2)
    return tiled.Config(1, 2, tiles, 2, 4 if tiles <= 8 else 3, max(min(wanted, few_columns), 1))


def default_tiled(scheme: Scheme, shape: Shape, rows: int, device: Device) -> tiled.Config:
    """Blocks of 128 outs and up to 128 rows, two to a multiprocessor where they are small, and splits to fill them."""
    most = min(tiled.STAGE_COLUMNS // scheme.step, tiled.MOST_TILES)
    tiles = next(n for n in tiled.ROW_TILES if 8 * n >= rows or n >= most)
    config = tiled.Config(1, 2, tiles, 2, 4 if tiles <= 8 else 3, 1, 2 if tiles <= 4 else 1)
    blocks = -(-shape[0] // config.outs) * -(-rows // config.rows)
    return replace(config, splits=max(min(device[1] * config.min_blocks // blocks, 8), 1))
