"""Which configuration runs what: measured where it was measured, a rule of thumb elsewhere. Nothing is tuned at import.

benchmarks/gpu_kernels.py --tune prints the table's rows. A key is (compute capability's major, kind of weight, tiles of
8 rows, shape class); the shape class is what a shape's outs come to in blocks of 64 per multiprocessor.
"""

from __future__ import annotations

from whit.kernels.gpu.stream import Config, Scheme, row_tiles

Key = tuple[int, str, int, str]
FEW_ROWS = 64  # beyond them, dequantizing first is faster
BYTES_AHEAD = 32  # that a thread loads of each row before it computes

TABLE: dict[Key, Config] = {}


def kind(scheme: Scheme) -> str:
    """What decides the work per weight: the codes, how many of them share a scale, zero points."""
    stored = scheme.storage
    name = "table" if stored.levels else f"int{stored.bits}"
    return f"{name}-{scheme.step}" + ("-zero" if stored.zero else "")


def shape_class(outs: int, multiprocessors: int) -> str:
    """Whether outs alone fill the device's multiprocessors."""
    blocks = outs / 64 / max(multiprocessors, 1)
    return "few" if blocks < 1 else "some" if blocks < 3 else "many"


def best(scheme: Scheme, shape: tuple[int, int], rows: int, device: tuple[int, int], invariant: bool = False) -> Config:
    """The configuration for x (rows, columns) times a weight of `shape` (outs, columns).

    `device`: the compute capability's major and the number of multiprocessors. An invariant one does not depend on
    the rows in anything that changes a row's sums.
    """
    tiles = row_tiles(rows)
    if not invariant:
        found = TABLE.get((device[0], kind(scheme), tiles, shape_class(shape[0], device[1])))
        if found is not None:
            return found
    return default(scheme, shape, tiles, device[1])


def default(scheme: Scheme, shape: tuple[int, int], tiles: int, multiprocessors: int) -> Config:
    """32 bytes ahead per row, four warps along outs and two along columns, enough splits for three blocks each.

    What changes the order of a sum (warps along columns, depth, splits) does not depend on the tiles of rows.
    """
    depth = max(BYTES_AHEAD * 8 // (scheme.chunk * scheme.storage.bits), 1)
    outs, columns = shape
    blocks, stages = -(-outs // 64), columns // scheme.step // (2 * depth)
    splits = max(min(3 * multiprocessors // blocks, stages // 2, 16), 1)
    return Config(1, 4, 2, depth, splits, 2 if tiles <= 2 else 1)
