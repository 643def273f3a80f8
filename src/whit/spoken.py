"""Figures, and what holds for many modules, as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable


def of_all_blocks(text: str) -> str:
    """A module's name, or a sentence with one, with the numbers of blocks as stars."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", text)


def by_reason(found: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence for each reason in (module, reason): the modules that it holds for, and it."""
    modules: dict[str, list[str]] = {}
    for name, reason in found:
        modules.setdefault(reason, []).append(name)
    return [f"{_named(names)}: {reason}" for reason, names in modules.items()]


def _named(names: list[str]) -> str:
    """A module; of several the first, its block a star, how many others a block has, and how many there are in all."""
    patterns = list(dict.fromkeys(map(of_all_blocks, names)))
    if len(names) == 1:
        return names[0]
    others = len(patterns) - 1
    more = f" and {others} other{'s' if others > 1 else ''}" if others else ""
    return f"{patterns[0]}{more} ({len(names)} modules)"


def size(count: float) -> str:
    """Bytes for people: 1.20 GB."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.2f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """An estimate for people: 45 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def took(seconds: float) -> str:
    """What was measured, for people: 4.2 s, 12 min 5 s, 3 h 7 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
