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
from whit.kernels.gpu.tables import Shape
from whit.kernels.gpu.tuned import nearest


@dataclass(frozen=True)
class Ahead:
    """Rows are quantized beside the products."""

    config: Config


Way: TypeAlias = OneRow | Few | Ahead | Config
ROWS = (1, 16, 64, 256, 1024, 4096)
FEWEST, MANY = Config(1, 128, 8, 2), Config(2, 256, 4)  # for few rows, and many

# NVIDIA H200. With outliers or without, up to how many rows, (outs, columns).
WAYS: dict[tuple[bool, int, Shape], Way] = {
    (False, 1, (4096, 4096)): Config(1, 128, 8, 2, 1),  # 8.5 us, bf16 12.7
    (False, 16, (4096, 4096)): Config(1, 128, 8, 2, 1),  # 10.0 us, bf16 12.6
    (False, 64, (4096, 4096)): Config(1, 32, 12),  # 10.2 us, bf16 11.9
    (False, 256, (4096, 4096)): Config(1, 128, 8),  # 13.9 us, bf16 16.7
    (False, 1024, (4096, 4096)): Config(2, 256, 4),  # 30.8 us, bf16 45.9
    (False, 4096, (4096, 4096)): Config(2, 256, 4),  # 110.3 us, bf16 176.2
    (False, 1, (14336, 4096)): Config(1, 128, 8),  # 19.7 us, bf16 31.5
    (False, 16, (14336, 4096)): Config(1, 128, 8),  # 19.6 us, bf16 31.3
    (False, 64, (14336, 4096)): Config(1, 128, 8),  # 19.9 us, bf16 34.1
    (False, 256, (14336, 4096)): Config(2, 256, 4),  # 31.1 us, bf16 44.8
    (False, 1024, (14336, 4096)): Config(2, 128, 6),  # 102.3 us, bf16 155.1
    (False, 4096, (14336, 4096)): Config(2, 256, 4),  # 342.1 us, bf16 607.6
    (False, 1, (4096, 14336)): Few(256, 4, 4, 0, 1),  # 22.6 us, bf16 31.2
    (False, 16, (4096, 14336)): Config(1, 128, 4, 4, 1),  # 25.8 us, bf16 32.3
    (False, 64, (4096, 14336)): Config(1, 128, 8, 2, 1),  # 22.4 us, bf16 36.0
    (False, 256, (4096, 14336)): Config(2, 128, 6, 2, 1),  # 35.6 us, bf16 47.9
    (False, 1024, (4096, 14336)): Config(2, 256, 4),  # 88.9 us, bf16 150.0
    (False, 4096, (4096, 14336)): Config(2, 256, 4),  # 342.5 us, bf16 591.0
    (True, 1, (4096, 4096)): Few(128, 4, 4, 0, 2),  # 10.0 us, bf16 12.7
    (True, 16, (4096, 4096)): Config(1, 64, 12),  # 14.2 us, bf16 12.6
    (True, 64, (4096, 4096)): Config(1, 32, 12),  # 13.5 us, bf16 11.9
    (True, 256, (4096, 4096)): Config(1, 128, 8),  # 19.4 us, bf16 16.7
    (True, 1024, (4096, 4096)): Config(2, 256, 4),  # 48.1 us, bf16 45.9
    (True, 4096, (4096, 4096)): Config(2, 256, 4),  # 154.5 us, bf16 176.2
    (True, 1, (14336, 4096)): Few(256, 4, 2, 4, 1),  # 23.2 us, bf16 31.5
    (True, 16, (14336, 4096)): Config(1, 128, 8),  # 25.6 us, bf16 31.3
    (True, 64, (14336, 4096)): Config(1, 128, 8),  # 27.4 us, bf16 34.1
    (True, 256, (14336, 4096)): Config(2, 256, 4),  # 38.3 us, bf16 44.8
    (True, 1024, (14336, 4096)): Config(2, 256, 4),  # 122.8 us, bf16 155.1
    (True, 4096, (14336, 4096)): Config(2, 256, 4),  # 393.1 us, bf16 607.6
    (True, 1, (4096, 14336)): Few(256, 4, 4, 0, 1),  # 24.2 us, bf16 31.2
    (True, 16, (4096, 14336)): Config(1, 128, 4, 4, 1),  # 36.7 us, bf16 32.3
    (True, 64, (4096, 14336)): Config(1, 64, 8, 2, 1),  # 35.7 us, bf16 36.0
    (True, 256, (4096, 14336)): Config(1, 128, 8),  # 55.9 us, bf16 47.9
    (True, 1024, (4096, 14336)): Config(2, 256, 4),  # 122.9 us, bf16 150.0
    (True, 4096, (4096, 14336)): Config(2, 256, 4),  # 449.5 us, bf16 591.0
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
    return fitted(found, outs, columns, rows, processors) if isinstance(found, Config) else found


def fitted(config: Config, outs: int, columns: int, rows: int, processors: int) -> Config:
    """The cut with no more blocks per tile than run at a time, each of them with four steps or more."""
    split = config.split
    while split > 1 and (split * config.tiles(outs, rows) > processors or split * 4 * STEP > columns):
        split //= 2
    return replace(config, split=split)
