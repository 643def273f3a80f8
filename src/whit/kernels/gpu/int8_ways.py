"""Which way a product of int8 activations goes on Hopper: what was fastest where it was measured.

`python benchmarks/int8_gpu.py --ways results/int8_gpu.json` prints the rows. Another shape takes the way of the nearest
one that was measured, more rows that of the most; what does not fit there is quantized first and multiplied then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from whit.kernels.gpu import int8_row
from whit.kernels.gpu.int8 import STEP, Config
from whit.kernels.gpu.int8_few import Few
from whit.kernels.gpu.int8_row import OneRow
from whit.kernels.gpu.int8_thin import Thin
from whit.kernels.gpu.tables import Shape
from whit.kernels.gpu.tuned import nearest


@dataclass(frozen=True)
class Ahead:
    """Rows are quantized beside the products."""

    config: Config


Way: TypeAlias = OneRow | Thin | Few | Ahead | Config
ROWS = (1, 16, 64, 256, 1024, 4096)
FEWEST, MANY = Config(1, 128, 8, 2), Config(2, 256, 4)  # for few rows, and many

# NVIDIA H200. With outliers or without, up to how many rows, (outs, columns).
WAYS: dict[tuple[bool, int, Shape], Way] = {
    (False, 1, (4096, 4096)): OneRow(4, 2),  # 6.5 us, bf16 12.7
    (False, 16, (4096, 4096)): Config(1, 64, 12, 2),  # 10.0 us, bf16 12.9
    (False, 64, (4096, 4096)): Config(1, 32, 12),  # 10.2 us, bf16 11.9
    (False, 256, (4096, 4096)): Config(1, 128, 8),  # 13.8 us, bf16 16.5
    (False, 1024, (4096, 4096)): Config(2, 256, 4),  # 31.1 us, bf16 46.1
    (False, 4096, (4096, 4096)): Config(2, 256, 4),  # 110.2 us, bf16 177.0
    (False, 1, (14336, 4096)): OneRow(3, 4),  # 18.4 us, bf16 31.3
    (False, 16, (14336, 4096)): Config(1, 128, 8),  # 19.5 us, bf16 31.8
    (False, 64, (14336, 4096)): Config(1, 128, 8),  # 20.1 us, bf16 34.6
    (False, 256, (14336, 4096)): Config(2, 256, 4),  # 31.0 us, bf16 46.0
    (False, 1024, (14336, 4096)): Config(2, 128, 6),  # 100.7 us, bf16 157.4
    (False, 4096, (14336, 4096)): Config(2, 256, 4),  # 346.4 us, bf16 616.1
    (False, 1, (4096, 14336)): OneRow(6, 2),  # 20.3 us, bf16 32.1
    (False, 16, (4096, 14336)): Config(1, 128, 4, 4),  # 25.4 us, bf16 32.7
    (False, 64, (4096, 14336)): Config(1, 128, 8, 2),  # 22.6 us, bf16 36.5
    (False, 256, (4096, 14336)): Config(2, 128, 6, 2),  # 35.5 us, bf16 49.1
    (False, 1024, (4096, 14336)): Config(2, 256, 4),  # 89.3 us, bf16 151.5
    (False, 4096, (4096, 14336)): Config(2, 256, 4),  # 344.3 us, bf16 596.6
    (True, 1, (4096, 4096)): OneRow(4, 2),  # 7.4 us, bf16 12.7
    (True, 16, (4096, 4096)): Config(1, 64, 8, 2),  # 12.6 us, bf16 12.9
    (True, 64, (4096, 4096)): Config(1, 64, 8, 2),  # 13.1 us, bf16 11.9
    (True, 256, (4096, 4096)): Config(1, 128, 8),  # 18.6 us, bf16 16.5
    (True, 1024, (4096, 4096)): Config(2, 256, 4),  # 38.1 us, bf16 46.1
    (True, 4096, (4096, 4096)): Config(2, 256, 4),  # 129.0 us, bf16 177.0
    (True, 1, (14336, 4096)): OneRow(6, 2),  # 20.7 us, bf16 31.3
    (True, 16, (14336, 4096)): Config(1, 128, 8),  # 23.3 us, bf16 31.8
    (True, 64, (14336, 4096)): Config(1, 128, 8),  # 24.3 us, bf16 34.6
    (True, 256, (14336, 4096)): Config(2, 256, 4),  # 35.4 us, bf16 46.0
    (True, 1024, (14336, 4096)): Config(2, 256, 4),  # 116.6 us, bf16 157.4
    (True, 4096, (14336, 4096)): Config(2, 256, 4),  # 389.6 us, bf16 616.1
    (True, 1, (4096, 14336)): OneRow(4, 2),  # 22.1 us, bf16 32.1
    (True, 16, (4096, 14336)): Config(1, 64, 12, 2),  # 31.9 us, bf16 32.7
    (True, 64, (4096, 14336)): Config(1, 64, 8, 2),  # 28.7 us, bf16 36.5
    (True, 256, (4096, 14336)): Config(1, 128, 8),  # 51.9 us, bf16 49.1
    (True, 1024, (4096, 14336)): Config(2, 256, 4),  # 107.1 us, bf16 151.5
    (True, 4096, (4096, 14336)): Config(2, 256, 4),  # 410.8 us, bf16 596.6
}


@lru_cache(maxsize=4096)
def way(outs: int, columns: int, rows: int, outliers: bool, processors: int) -> Way:
    """The way for x (rows, columns) and a weight (outs, columns)."""
    of = next((most for most in ROWS if rows <= most), ROWS[-1])
    near = nearest([shape for kind, most, shape in WAYS if (kind, most) == (outliers, of)], (outs, columns))
    found = MANY if near is None else WAYS[outliers, of, near]
    if isinstance(found, Ahead):
        return Ahead(fitted(found.config, outs, columns, rows, processors))
    if isinstance(found, OneRow) and not int8_row.fits(rows, columns):
        found = FEWEST
    if isinstance(found, Few) and not found.fits(columns, rows):
        found = FEWEST
    if isinstance(found, Thin):
        return found
    return fitted(found, outs, columns, rows, processors) if isinstance(found, Config) else found


def fitted(config: Config, outs: int, columns: int, rows: int, processors: int) -> Config:
    """The cut with no more blocks per tile than run at a time, each of them with four steps or more."""
    split = config.split
    while split > 1 and (split * config.tiles(outs, rows) > processors or split * 4 * STEP > columns):
        split //= 2
    return replace(config, split=split)
