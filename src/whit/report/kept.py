"""What was measured, kept as JSON under a hash of all that it depends on."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from whit.checkpoint.files import write_whole
from whit.checkpoint.writer import file_sha256
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
    """What was kept there; None for nothing."""
    if not place.is_file():
        return None
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def keep(place: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write it whole or not at all; returns it."""
    write_whole(place, json.dumps(value, indent=1).encode())
    return value
