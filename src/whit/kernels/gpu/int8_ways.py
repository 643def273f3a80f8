"""Which way a product of int8 activations goes on Hopper: what was fastest where it was measured.

`python benchmarks/int8_gpu.py --ways results/int8_gpu.json` prints the rows. Another shape takes the way of the nearest
one that was measured, more rows that of the most; what does not fit there is quantized first and multiplied then. An
H200 reads memory faster than an H100; another device takes the ways of this.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

from whit.kernels.gpu import int8_row
from whit.kernels.gpu.int8 import LARGEST_SHARED, STEP, Config
from whit.kernels.gpu.int8_row import OneRow
from whit.kernels.gpu.int8_thin import Thin
from whit.kernels.gpu.near import nearest
from whit.kernels.gpu.tables import Shape

Way: TypeAlias = OneRow | Thin | Config
ROWS = (1, 16, 64, 256, 1024, 4096)
FEWEST, MANY = Config(1, 128, 8, 2), Config(2, 256, 4)  # for few rows, and many
EVEN = Config(1, 128, 8)  # for many where a row of y does not begin at 16 bytes

# With outliers or without, up to how many rows, (outs, columns).
Ways: TypeAlias = dict[tuple[bool, int, Shape], Way]
H100: Ways = {
    (False, 1, (4096, 4096)): OneRow(4, 2),  # 7.5 us, bf16 15.7
    (False, 16, (4096, 4096)): Thin(64, 11, 2, 8, 99, 2, 3),  # 7.8 us, bf16 15.9
    (False, 64, (4096, 4096)): Thin(64, 16, 2, 5, 99, 1, 3),  # 9.0 us, bf16 14.6
    (False, 256, (4096, 4096)): Config(1, 128, 8),  # 13.8 us, bf16 19.1
    (False, 1024, (4096, 4096)): Config(2, 256, 4),  # 30.4 us, bf16 45.8
    (False, 4096, (4096, 4096)): Config(2, 256, 4),  # 108.1 us, bf16 175.9
    (False, 1, (14336, 4096)): Thin(128, 12, 1, 6, 99, 1, 4),  # 20.5 us, bf16 42.5
    (False, 16, (14336, 4096)): Thin(64, 11, 1, 8, 8, 2, 4),  # 21.5 us, bf16 42.8
    (False, 64, (14336, 4096)): Config(1, 128, 8),  # 24.7 us, bf16 44.7
    (False, 256, (14336, 4096)): Config(2, 256, 4),  # 33.8 us, bf16 50.2
    (False, 1024, (14336, 4096)): Config(2, 256, 4, 1, 2),  # 99.4 us, bf16 156.6
    (False, 4096, (14336, 4096)): Config(2, 256, 4, 1, 2),  # 334.7 us, bf16 611.4
    (False, 1, (4096, 14336)): Thin(64, 26, 2, 6, 99, 1, 6),  # 20.9 us, bf16 44.3
    (False, 16, (4096, 14336)): Thin(64, 24, 2, 8, 99, 1, 5),  # 21.9 us, bf16 44.8
    (False, 64, (4096, 14336)): Thin(64, 20, 2, 6, 16, 1, 5),  # 24.6 us, bf16 46.6
    (False, 256, (4096, 14336)): Config(2, 128, 6, 2),  # 39.9 us, bf16 56.8
    (False, 1024, (4096, 14336)): Config(2, 256, 4, 1, 2),  # 88.7 us, bf16 149.8
    (False, 4096, (4096, 14336)): Config(2, 256, 4, 1, 2),  # 350.2 us, bf16 593.6
    (True, 1, (4096, 4096)): OneRow(6, 2),  # 8.3 us, bf16 15.7
    (True, 16, (4096, 4096)): Thin(64, 16, 2, 8, 99, 1, 3),  # 8.4 us, bf16 15.9
    (True, 64, (4096, 4096)): Thin(64, 16, 2, 5, 99, 1, 2),  # 10.8 us, bf16 14.6
    (True, 256, (4096, 4096)): Config(1, 128, 8),  # 17.7 us, bf16 19.1
    (True, 1024, (4096, 4096)): Config(2, 256, 4),  # 36.0 us, bf16 45.8
    (True, 4096, (4096, 4096)): Config(2, 256, 4),  # 125.0 us, bf16 175.9
    (True, 1, (14336, 4096)): Thin(128, 13, 1, 6, 99, 1, 3),  # 21.0 us, bf16 42.5
    (True, 16, (14336, 4096)): Thin(64, 11, 1, 8, 8, 2, 4),  # 22.5 us, bf16 42.8
    (True, 64, (14336, 4096)): Config(1, 128, 8),  # 26.8 us, bf16 44.7
    (True, 256, (14336, 4096)): Config(2, 256, 4),  # 37.8 us, bf16 50.2
    (True, 1024, (14336, 4096)): Config(2, 256, 4, 1, 2),  # 107.3 us, bf16 156.6
    (True, 4096, (14336, 4096)): Config(2, 256, 4, 1, 2),  # 356.6 us, bf16 611.4
    (True, 1, (4096, 14336)): Thin(64, 26, 2, 6, 99, 1, 6),  # 21.7 us, bf16 44.3
    (True, 16, (4096, 14336)): Thin(64, 24, 2, 8, 99, 1, 5),  # 23.4 us, bf16 44.8
    (True, 64, (4096, 14336)): Thin(64, 20, 2, 6, 8, 1, 4),  # 27.0 us, bf16 46.7
    (True, 256, (4096, 14336)): Config(1, 128, 8),  # 51.4 us, bf16 59.3
    (True, 1024, (4096, 14336)): Config(2, 256, 4, 1, 2),  # 101.4 us, bf16 149.8
    (True, 4096, (4096, 14336)): Config(2, 256, 4, 1, 2),  # 395.0 us, bf16 593.6
}
H200: Ways = {
    (False, 1, (4096, 4096)): OneRow(4, 2),  # 6.5 us, bf16 12.7
    (False, 16, (4096, 4096)): Thin(64, 10, 2, 10, 8),  # 8.1 us, bf16 12.7
    (False, 64, (4096, 4096)): Config(1, 32, 12),  # 10.1 us, bf16 12.0
    (False, 256, (4096, 4096)): Config(1, 128, 8),  # 13.8 us, bf16 16.6
    (False, 1024, (4096, 4096)): Config(2, 256, 4),  # 30.7 us, bf16 45.5
    (False, 4096, (4096, 4096)): Config(2, 256, 4),  # 110.2 us, bf16 173.8
    (False, 1, (14336, 4096)): Thin(64, 11, 1, 11, 99),  # 16.7 us, bf16 31.3
    (False, 16, (14336, 4096)): Thin(64, 10, 1, 10, 8),  # 17.9 us, bf16 31.9
    (False, 64, (14336, 4096)): Thin(64, 6, 1, 6, 8),  # 20.2 us, bf16 34.8
    (False, 256, (14336, 4096)): Config(2, 256, 4),  # 30.8 us, bf16 45.1
    (False, 1024, (14336, 4096)): Config(2, 128, 6),  # 100.5 us, bf16 154.0
    (False, 4096, (14336, 4096)): Config(2, 256, 4),  # 340.6 us, bf16 603.3
    (False, 1, (4096, 14336)): Thin(128, 6, 4, 6, 99),  # 18.6 us, bf16 31.8
    (False, 16, (4096, 14336)): Thin(128, 5, 4, 5, 99),  # 20.8 us, bf16 32.8
    (False, 64, (4096, 14336)): Config(1, 128, 8, 2),  # 22.6 us, bf16 36.3
    (False, 256, (4096, 14336)): Config(2, 128, 6, 2),  # 35.6 us, bf16 48.1
    (False, 1024, (4096, 14336)): Config(2, 256, 4),  # 88.0 us, bf16 148.5
    (False, 4096, (4096, 14336)): Config(2, 256, 4),  # 338.6 us, bf16 584.9
    (True, 1, (4096, 4096)): OneRow(6, 2),  # 7.4 us, bf16 12.7
    (True, 16, (4096, 4096)): Thin(64, 10, 2, 10, 8),  # 10.3 us, bf16 12.7
    (True, 64, (4096, 4096)): Config(1, 32, 12),  # 12.7 us, bf16 12.0
    (True, 256, (4096, 4096)): Config(1, 128, 8),  # 17.9 us, bf16 16.6
    (True, 1024, (4096, 4096)): Config(2, 256, 4),  # 37.7 us, bf16 45.5
    (True, 4096, (4096, 4096)): Config(2, 256, 4),  # 130.3 us, bf16 173.8
    (True, 1, (14336, 4096)): Thin(64, 11, 1, 11, 99),  # 17.5 us, bf16 31.3
    (True, 16, (14336, 4096)): Thin(64, 10, 1, 10, 99),  # 20.5 us, bf16 31.9
    (True, 64, (14336, 4096)): Config(1, 128, 8),  # 23.6 us, bf16 34.8
    (True, 256, (14336, 4096)): Config(2, 256, 4),  # 33.7 us, bf16 45.1
    (True, 1024, (14336, 4096)): Config(2, 128, 6),  # 108.7 us, bf16 154.0
    (True, 4096, (14336, 4096)): Config(2, 256, 4),  # 366.0 us, bf16 603.3
    (True, 1, (4096, 14336)): Thin(256, 3, 8, 3, 99),  # 21.4 us, bf16 31.8
    (True, 16, (4096, 14336)): Thin(64, 10, 2, 10, 99),  # 22.8 us, bf16 32.8
    (True, 64, (4096, 14336)): Config(1, 64, 8, 2),  # 29.0 us, bf16 36.3
    (True, 256, (4096, 14336)): Config(1, 128, 8),  # 47.3 us, bf16 48.1
    (True, 1024, (4096, 14336)): Config(2, 256, 4),  # 103.1 us, bf16 148.5
    (True, 4096, (4096, 14336)): Config(2, 256, 4),  # 390.4 us, bf16 584.9
}


@lru_cache(maxsize=4096)
def way(outs: int, columns: int, rows: int, outliers: bool, processors: int, device: str = "") -> Way:
    """The way for x (rows, columns) and a weight (outs, columns), on a device of that name."""
    ways, of = H200 if "H200" in device else H100, next((most for most in ROWS if rows <= most), ROWS[-1])
    near = nearest([shape for kind, most, shape in ways if (kind, most) == (outliers, of)], (outs, columns))
    found = MANY if near is None else ways[outliers, of, near]
    if isinstance(found, OneRow) and not int8_row.fits(rows, columns):
        found = FEWEST
    return fitted(found, outs, columns, rows, processors) if isinstance(found, Config) else found


def fitted(config: Config, outs: int, columns: int, rows: int, processors: int) -> Config:
    """The cut with no more blocks per tile than run at a time, each of them with four steps or more."""
    split = config.split
    while split > 1 and (split * config.tiles(outs, rows) > processors or split * 4 * STEP > columns):
        split //= 2
    found = replace(config, split=split)
    found = EVEN if found.through and outs % 8 else found
    while found.shared_bytes(outliers=True, shifted=True) > LARGEST_SHARED:  # outs that leave through it need room
        found = replace(found, stages=found.stages - 1)
    return found
