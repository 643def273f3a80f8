"""Which candidates are worth their bytes: the size-against-divergence front, and its chart as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 52


def measured(rows: Sequence[Row]) -> list[Row]:
    """Rows that have a size and a divergence of their own: neither failed nor the original."""
    return [row for row in rows if "error" not in row and row["kind"] != "original" and row.get("kl")]


def front(rows: Sequence[Row]) -> list[Row]:
    """Of the measured rows those that no other beats in both size and mean KL, smallest first."""
    best: list[Row] = []
    for row in sorted(measured(rows), key=lambda row: (row["size_bytes"], row["kl"]["mean"])):
        if not best or row["kl"]["mean"] < best[-1]["kl"]["mean"]:
            best.append(row)
    return best


@dataclass(frozen=True)
class Tick:
    """A place on an axis in pixels, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """A candidate in the chart."""

    row: Row
    x: float
    y: float
    is_best: bool


@dataclass(frozen=True)
class Chart:
    """Everything that the template draws, in pixels."""

    points: tuple[Point, ...]
    line: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    original_x: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(rows: Sequence[Row]) -> Chart | None:
    """Size in MB across, KL on a logarithmic axis up; None where nothing was measured."""
    shown = measured(rows)
    if not shown:
        return None
    original = next((row for row in rows if row["kind"] == "original" and "error" not in row), None)
    sizes = [row["size_bytes"] / 1e6 for row in (*shown, *([original] if original else []))]
    step = _step(max(sizes) * 1.05)
    most: float = step * math.ceil(max(sizes) * 1.02 / step)
    divergences = [max(row["kl"]["mean"], 1e-7) for row in shown]
    low, high = math.floor(math.log10(min(divergences))), math.ceil(math.log10(max(divergences)))
    high = max(high, low + 1)

    def x(size: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * size / most, 1)

    def y(divergence: float) -> float:
        share = (math.log10(max(divergence, 1e-7)) - low) / (high - low)
        return float(round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1))

    best = [id(row) for row in front(rows)]
    points = tuple(Point(r, x(r["size_bytes"] / 1e6), y(r["kl"]["mean"]), id(r) in best) for r in shown)
    line = " ".join(f"{p.x},{p.y}" for p in sorted(points, key=lambda p: p.x) if p.is_best)
    x_ticks = tuple(Tick(x(step * i), f"{step * i:g}") for i in range(round(most / step) + 1))
    y_ticks = tuple(Tick(y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1))
    return Chart(points, line, x_ticks, y_ticks, x(original["size_bytes"] / 1e6) if original else None)


def _step(most: float) -> float:
    """A round distance between ticks that gives about six of them."""
    power = math.pow(10.0, math.floor(math.log10(most / 6)))
    return float(min(power * m for m in (1, 2, 5, 10) if power * m >= most / 6))
