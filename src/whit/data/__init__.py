"""What ships inside the package: a small real model, a held-out text and a calibration text.

`whit:model`, `whit:heldout` and `whit:text` name them wherever a model or a text is asked for.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from whit.errors import CheckpointError, EvaluationError

_TEXTS = {"whit:heldout": "heldout.txt", "whit:text": "calibration.txt"}


def data_path(*parts: str) -> Path:
    """The place of a shipped file or folder; it need not exist."""
    return Path(str(resources.files("whit.data"))).joinpath(*parts)


def resolve_model(name: str) -> str:
    """`whit:model` becomes the folder of the shipped model; every other name is returned as it is."""
    if name != "whit:model":
        if name.startswith("whit:"):
            raise CheckpointError(f"{name}: no such model ships with whit; the one that does is whit:model")
        return name
    folder = data_path("model")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: this installation of whit carries no model; name a folder or a hub id instead")
    return str(folder)


def resolve_text(name: str) -> Path:
    """`whit:heldout` and `whit:text` become the shipped files; every other name is taken as a path."""
    if not name.startswith("whit:"):
        return Path(name).expanduser()
    if name not in _TEXTS:
        raise EvaluationError(f"{name}: no such text ships with whit; those that do are {' and '.join(_TEXTS)}")
    path = data_path("text", _TEXTS[name])
    if not path.is_file():
        raise EvaluationError(f"{name}: this installation of whit carries no {path.name}; name a text file instead")
    return path
