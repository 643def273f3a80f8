"""Safetensors shards whose tensors are all known before the first is there.

Headers are written first and files get their full size at once (so that a full disk shows before the work); every
tensor then goes straight to its place, in any order. The files are those that the safetensors library would write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from whit.checkpoint.header import Entry, byte_view, count_parameters, encode_header, file_order, read_bytes
from whit.checkpoint.reader import INDEX, SINGLE, Checkpoint
from whit.tensor import TensorSpec

CHUNK = 8 << 20  # bytes copied or hashed at a time


@dataclass(frozen=True)
class Shard:
    """One file to be written."""

    name: str
    specs: Mapping[str, TensorSpec]

    @cached_property
    def _layout(self) -> tuple[bytes, dict[str, int]]:
        return encode_header(self.specs)

    @property
    def header(self) -> bytes:
        return self._layout[0]

    @property
    def starts(self) -> Mapping[str, int]:
        """Where in the file each tensor begins."""
        return self._layout[1]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs.values())


def plan_shards(tensors: Iterable[tuple[str, TensorSpec]], limit: int) -> tuple[Shard, ...]:
    """Fill shards of at most `limit` bytes of tensors in the given order; a larger tensor has one of its own."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors:
        if groups[-1] and size + spec.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    if len(groups) == 1:
        return (Shard(SINGLE, file_order(groups[0])),)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return tuple(Shard(name, file_order(group)) for name, group in zip(names, groups, strict=True))


def index_json(shards: tuple[Shard, ...]) -> dict[str, bytes]:
    """The index that several shards need, by file name."""
    if len(shards) == 1:
        return {}
    total = sum(shard.size - len(shard.header) for shard in shards)
    parameters = sum(count_parameters(shard.specs) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    return {INDEX: (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()}


class Writer:
    """Open shards in a folder. `write` and `copy` may be called in any order and again after a restart."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        self._places: dict[str, tuple[int, int, int]] = {}
        self._descriptors: list[int] = []
        for shard in shards:
            descriptor = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors.append(descriptor)
            os.posix_fallocate(descriptor, 0, shard.size)
            _write_bytes(descriptor, memoryview(shard.header), 0)
            for name, start in shard.starts.items():
                self._places[name] = (descriptor, start, shard.specs[name].nbytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place."""
        descriptor, start, size = self._places[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert data.numel() == size, f"{name}: {data.numel()} bytes where {size} were planned"
        _write_bytes(descriptor, byte_view(data), start)

    def copy(self, name: str, source: Checkpoint, entry: Entry) -> None:
        """Copy a tensor's bytes from another file, a few at a time."""
        descriptor, start, size = self._places[name]
        assert entry.stop - entry.start == size, f"{name}: {entry.stop - entry.start} bytes where {size} were planned"
        buffer = memoryview(bytearray(min(CHUNK, size)))
        for done in range(0, size, CHUNK):
            part = buffer[: size - done]
            read_bytes(source.descriptor(entry.path), part, entry.start + done, entry.path)
            _write_bytes(descriptor, part, start + done)

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _write_bytes(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
