"""The small files beside the weights: which of MODEL's are taken over, and how one is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from whit.checkpoint.reader import INDEX
from whit.errors import CheckpointError

SUFFIXES = {".json", ".txt", ".model", ".jinja"}
REPLACED = {"config.json", "whit.json", INDEX}  # the result has its own
# What other programs say of a quantized source's own codes and graph: untrue of what is made of it.
OF_SOURCE = {"quantize_config.json", "quant_config.json", "quantization_config.json", "genai_config.json"}


def side_files(folder: Path, code: bool = False) -> Iterator[tuple[str, Path]]:
    """(name, path) of what is copied from a model folder; Python files only where `code` says so."""
    wanted = SUFFIXES | ({".py"} if code else set())
    places = (folder, folder / "additional_chat_templates")
    for path in sorted(path for place in places if place.is_dir() for path in place.iterdir()):
        is_licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if path.is_file() and path.name not in REPLACED | OF_SOURCE and (path.suffix in wanted or is_licence):
            _check_link(folder, path)
            yield str(path.relative_to(folder)), path


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
    """A link may lead to another file of the model or, as in the hub's cache, to its blobs; never elsewhere."""
    target = path.resolve()
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path}: links to {target}, outside of the model; it must be a file of its own; replace it"
        )
