"""The small files beside the weights: which of MODEL's are taken over, and how one is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from whit.checkpoint.reader import INDEX, QUANTO_MAPS
from whit.errors import CheckpointError

SUFFIXES = {".json", ".txt", ".model", ".jinja"}
PARTS = "modules.json"  # of sentence-transformers: what follows the transformer, each with a folder of its own
REPLACED = {"config.json", "whit.json", INDEX}  # the result has its own
# What other programs say of a quantized source's own codes and graph: untrue of what is made of it.
OF_SOURCE = {
    "quantize_config.json", "quant_config.json", "quantization_config.json", "genai_config.json", *QUANTO_MAPS,
}  # fmt: skip


def side_files(folder: Path, code: bool = False) -> Iterator[tuple[str, Path]]:
    """(name, path) of what is copied from a model folder; Python files only where `code` says so.

    CheckpointError for one that cannot be read, or is a link that leads elsewhere.
    """
    wanted = SUFFIXES | ({".py"} if code else set())
    for path in _files(folder):
        is_licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        is_own = path.name in REPLACED | OF_SOURCE or path.name.endswith(".index.json")  # of weights in another form
        if not is_own and (path.suffix in wanted or is_licence):
            yield _checked(folder, path)
    for place in (folder / "additional_chat_templates", *_parts(folder)):
        for path in _files(place):
            if path.suffix in wanted | {".safetensors"}:
                yield _checked(folder, path)


def check_side_files(folder: Path, code: bool = False) -> None:
    """What `side_files` raises, before any work."""
    tuple(side_files(folder, code))


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else []


def _parts(folder: Path) -> list[Path]:
    """Folders of what sentence-transformers runs behind the model: how it pools, a dense layer."""
    try:
        listed = json.loads((folder / PARTS).read_text(encoding="utf-8"))
        names = [str(part["path"]) for part in listed]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [folder / name for name in names if name and Path(name).name == name]


def _checked(folder: Path, path: Path) -> tuple[str, Path]:
    """Name and path of a file that may be copied."""
    _check_link(folder, path)
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: cannot be read; it goes with the weights; change its permissions")
    return str(path.relative_to(folder)), path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace one, whole or not at all: a killed run leaves none that is torn. OSError names it."""
    with _unfinished(path) as unfinished:
        unfinished.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """The same for tensors, as a safetensors file."""
    with _unfinished(path) as unfinished:
        save_file(dict(tensors), unfinished, None if metadata is None else dict(metadata))


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Where a file is written that then takes its place; what could not be written whole goes."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        number = error.errno if isinstance(error, OSError) else _number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _number(error: SafetensorError) -> int | None:
    """Of the system's error that safetensors tells in words."""
    found = re.search(r"os error (\d+)", str(error))
    return None if found is None else int(found[1])


def _check_link(folder: Path, path: Path) -> None:
    """A link may lead to another file of the model or to blobs of the hub's cache; never elsewhere."""
    target, home = path.resolve(), folder.resolve()
    in_cache = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    if home.parent.name == "snapshots":
        in_cache = in_cache or target.is_relative_to(home.parent.parent / "blobs")
    if not (in_cache or target.is_relative_to(home)):
        raise CheckpointError(
            f"{path}: links to {target}, outside of the model; it must be a file of its own; replace it"
        )
