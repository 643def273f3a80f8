"""Which configuration runs what: measured where it was measured, a rule of thumb elsewhere. Nothing is tuned at import.

benchmarks/gpu_kernels.py --tune prints the table's rows. Another shape takes the configuration of the nearest one that
was measured, with as many blocks.
"""

from __future__ import annotations

from dataclasses import replace
from math import log2

from whit.kernels.gpu.stream import Config, Scheme, row_tiles

Shape = tuple[int, int]
FEW_ROWS = 64  # beyond them, dequantizing first is faster
BYTES_AHEAD = 32  # that a thread loads of each row before it computes

Table = dict[tuple[str, int, Shape], tuple[int, int, int, int, int, int]]
MOST_COLUMNS = 640  # of 64 rows of x, twice, that fit in shared memory beside a table of levels

# (kind of weight, tiles of 8 rows, (outs, columns)): tiles, warps_out, warps_columns, depth, splits, min_blocks.
# Measured on: nothing yet.
HOPPER: Table = {}
TABLES = {9: HOPPER}  # by the major number of the compute capability


def kind(scheme: Scheme) -> str:
    """What decides the work per weight: the codes, how many of them share a scale, zero points."""
    stored = scheme.storage
    name = "table" if stored.levels else f"int{stored.bits}"
    return f"{name}-{scheme.step}" + ("-zero" if stored.zero else "")


def best(scheme: Scheme, shape: Shape, rows: int, device: tuple[int, int], invariant: bool = False) -> Config:
    """The configuration for x (rows, columns) times a weight of `shape` (outs, columns).

    `device`: the compute capability's major and the number of multiprocessors. An invariant one does not depend on
    the rows in anything that changes a row's sums.
    """
    tiles = row_tiles(rows)
    found = None if invariant else nearest(TABLES.get(device[0], {}), kind(scheme), tiles, shape)
    return found or default(scheme, shape, tiles, device[1])


def nearest(table: Table, kind: str, tiles: int, shape: Shape) -> Config | None:
    """The row of the table for the shape nearest to this one, with splits for as many blocks; None without any."""
    measured = [where for name, n, where in table if (name, n) == (kind, tiles)]
    if not measured:
        return None
    near = min(measured, key=lambda s: abs(log2(s[0] / shape[0])) + abs(log2(s[1] / shape[1])))
    config = Config(*table[kind, tiles, near])
    blocks = -(-near[0] // config.outs) * config.splits
    return replace(config, splits=max(round(blocks / -(-shape[0] // config.outs)), 1))


def default(scheme: Scheme, shape: Shape, tiles: int, multiprocessors: int) -> Config:
    """32 bytes ahead per row, four warps along outs and two along columns, enough splits for three blocks each.

    What changes the order of a sum (warps along columns, depth, splits) does not depend on the tiles of rows.
    """
    ahead = max(BYTES_AHEAD * 8 // (scheme.chunk * scheme.storage.bits), 1)
    depth = max(min(ahead, MOST_COLUMNS // (2 * scheme.step)), 1)
    outs, columns = shape
    blocks, stages = -(-outs // 64), columns // scheme.step // (2 * depth)
    splits = max(min(3 * multiprocessors // blocks, stages // 2, 16), 1)
    return Config(1, 4, 2, depth, splits, 2 if tiles <= 2 else 1)
