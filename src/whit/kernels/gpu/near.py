"""Which shape that was measured stands for another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log2

from whit.kernels.gpu.tables import Shape


def measured(table: Mapping[tuple[str, int, Shape], object], kind: str, rows: int) -> list[Shape]:
    """The shapes in the table for a kind of weight and rows."""
    return [where for name, n, where in table if (name, n) == (kind, rows)]


def nearest(shapes: Iterable[Shape], shape: Shape) -> Shape | None:
    """The one of the shapes that is nearest to this one; None without any."""
    return min(shapes, key=lambda s: abs(log2(s[0] / shape[0])) + abs(log2(s[1] / shape[1])), default=None)


def rescaled(outs: int, splits: int, known: Shape, shape: Shape) -> int:
    """Splits for as many blocks of `outs` as the measured shape had."""
    blocks = -(-known[0] // outs) * splits
    return max(round(blocks / -(-shape[0] // outs)), 1)
