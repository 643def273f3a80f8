"""A safetensors folder as a lazy mapping from names to tensors: checked whole on opening, read one tensor at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from whit.checkpoint.header import Entry, byte_view, read_bytes, read_description, read_header
from whit.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTO_MAPS = ("quanto_qmap.json", "quantization_map.json")  # optimum-quanto says so there, and not in config.json
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.msgpack", "*.h5")


class Tensors(Protocol):
    """What the parameters of a model are read from: a Checkpoint, or another program's file that is shown as one.

    `checkpoint[name]` reads a tensor, `entries` says where it lies; `folder` has config.json, `shards` are the files.
    """

    folder: Path
    entries: dict[str, Entry]

    @property
    def shards(self) -> tuple[Path, ...]: ...
    def __getitem__(self, name: str, /) -> Tensor: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object, /) -> bool: ...
    def descriptor(self, path: Path) -> int: ...
    def close(self) -> None: ...


class TensorFiles(Mapping[str, Tensor]):
    """Tensors that lie in files: `entries` says of each its file, place, shape and dtype; indexing reads it."""

    entries: dict[str, Entry]

    def __init__(self) -> None:
        self.entries = {}
        self._descriptors: dict[Path, int] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor into fresh memory."""
        entry = self.entries[name]
        data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        read_bytes(self.descriptor(entry.path), byte_view(data), entry.start, entry.path)
        return data.view(entry.spec.dtype).reshape(entry.spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def descriptor(self, path: Path) -> int:
        """An open read-only file descriptor of one of the files."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


class Checkpoint(TensorFiles):
    """The tensors of a folder. `checkpoint[name]` reads; `checkpoint.entries[name]` says shape, dtype and place.

    `metadata` is what the files' headers say beside their tensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.shards = find_shards(folder)
        self.metadata: dict[str, str] = {}
        for shard in self.shards:
            entries, metadata = read_description(shard)
            self.metadata = {**metadata, **self.metadata}
            for name, entry in entries.items():
                if name in self.entries:
                    where = f"{self.entries[name].path.name} and {shard.name}"
                    raise CheckpointError(f"{folder}: {name} is in {where}; it must be in one file; remove one")
                self.entries[name] = entry
        _check_index(folder, self.entries)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def find_shards(folder: Path) -> tuple[Path, ...]:
    """The weight files of a model folder, in name order."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; it must hold config.json and safetensors files; check the path"
        )
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file() and SINGLE not in _weight_map(folder).values():
            raise CheckpointError(
                f"{folder}: both {SINGLE} and {INDEX}, which lists other files; one of them must be the model, and "
                "transformers takes the first; remove the other"
            )
        return _indexed_shards(folder)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return (others[0],)
    if others:
        names = ", ".join(path.name for path in others)
        raise CheckpointError(f"{folder}: {names} without {INDEX}; shards need their index; download it too")
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder}: only {', '.join(pickles)}, which whit never opens, as pickles can run code; "
            f"weights must be safetensors; {_how_to_convert(folder)}"
        )
    raise CheckpointError(f"{folder}: no *.safetensors file; a model folder must hold one; check the path")


def _how_to_convert(folder: Path) -> str:
    """What to do about pickles. Those of torchao hold its own classes, so that saving them again pickles them again."""
    said = read_json(folder / "config.json").get("quantization_config") if (folder / "config.json").is_file() else None
    if isinstance(said, dict) and said.get("quant_method") == "torchao":
        return (
            "open these once with the torchao that wrote them where you trust them, and save what dequantize() gives, "
            "or quantize the original model again: torchao from 0.15 on writes safetensors"
        )
    if (folder / "qmodel.pt").is_file():
        return "open these once with hqq where you trust them, and save them again by its save_to_safetensors"
    return "convert them with save_pretrained where you trust them"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model folder must hold it; check the path") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); it must be; get another copy") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; it must be one; get another copy")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with a `quantization_config` where only other files tell that the model is quantized.

    optimum-quanto has a map beside the weights, and hqq's own `save_to_safetensors` nothing but its tensors.
    """
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        return config
    path = next((path for name in QUANTO_MAPS if (path := folder / name).is_file()), None)
    if path is not None:
        return {**config, "quantization_config": {"quant_method": "quanto", "modules": read_json(path)}}
    return {**config, "quantization_config": {"quant_method": "hqq"}} if _has_hqq(folder) else config


def _has_hqq(folder: Path) -> bool:
    """Whether the first weight file has a linear of hqq's, which is enough: every file has some blocks."""
    first = next(iter(sorted(folder.glob("*.safetensors"))), None)
    try:
        return first is not None and any(name.endswith(".W_q") for name in read_header(first))
    except CheckpointError:  # said where the weights are opened
        return False


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: no weight_map; it must map names to files; get another copy")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: names the file {name!r}; it must be a *.safetensors beside it; fix it"
            )
    return weight_map


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    names = sorted(set(_weight_map(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: lacks {', '.join(missing)}, which {INDEX} lists; all must be there; download them"
        )
    pattern = re.compile(r"model-\d+-of-\d+\.safetensors")
    extra = sorted(p.name for p in folder.iterdir() if pattern.fullmatch(p.name) and p.name not in names)
    if extra:
        raise CheckpointError(f"{folder}: {', '.join(extra)} is not in {INDEX}; every shard must be; remove or list it")
    return tuple(folder / name for name in names)


def _check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    if not (folder / INDEX).is_file():
        return
    weight_map = _weight_map(folder)
    wrong = [
        f"{name} (listed in {file})"
        for name, file in weight_map.items()
        if name not in entries or entries[name].path.name != file
    ]
    wrong += [f"{name} (in {entries[name].path.name}, not listed)" for name in entries.keys() - weight_map.keys()]
    if wrong:
        shown = ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CheckpointError(
            f"{folder}: {INDEX} and the shards disagree about {shown}; they must agree; get them again"
        )
