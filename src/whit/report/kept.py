"""What was measured, kept as JSON under a hash of all that it depends on."""

from __future__ import annotations

import json
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

from whit.checkpoint.files import write_whole
from whit.checkpoint.writer import file_sha256
from whit.errors import WhitWarning
from whit.evaluation.size import weight_files
from whit.integrations.loading import model_files


def key(*parts: Any) -> str:
    """A hash of plain values."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def contents(model: str) -> str:
    """A hash of a model's weights and configuration."""
    files = model_files(model)
    config = [files / "config.json"] if files.is_dir() else []
    return key([(path.name, file_sha256(path)) for path in [*weight_files(files), *config]])


def recall(place: Path) -> dict[str, Any] | None:
    """What was kept there; None for nothing, and where it is damaged, which is said."""
    if not place.is_file():
        return None
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    warnings.warn(f"{place}: damaged; what it held is measured again", WhitWarning, stacklevel=2)
    return None


def keep(place: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write it whole or not at all; returns it."""
    write_whole(place, json.dumps(value, indent=1).encode())
    return value
