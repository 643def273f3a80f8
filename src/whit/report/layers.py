"""Errors by layer and projection, from the account of a candidate that whit made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.*?)(?:\.weight)?$")


@dataclass(frozen=True)
class Grid:
    """Relative errors ||W - W^|| / ||W||: one row per block, one column per projection; None where there is none."""

    blocks: tuple[int, ...]
    projections: tuple[str, ...]
    errors: tuple[tuple[float | None, ...], ...]

    @property
    def most(self) -> float:
        return max((e for row in self.errors for e in row if e is not None), default=0.0)


def grid(layers: Sequence[dict[str, Any]]) -> Grid | None:
    """The grid of the layers that lie in numbered blocks; None where there are none."""
    found: dict[tuple[int, str], float] = {}
    for layer in layers:
        match = BLOCK.match(layer["name"])
        if match and layer["relative_error"] is not None:
            found[int(match[2]), match[3]] = layer["relative_error"]
    if not found:
        return None
    blocks = tuple(sorted({block for block, _ in found}))
    projections = tuple(dict.fromkeys(name for _, name in found))
    return Grid(blocks, projections, tuple(tuple(found.get((b, p)) for p in projections) for b in blocks))
