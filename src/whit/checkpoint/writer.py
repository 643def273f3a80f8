"""Files whose tensors are all known before the first is there.

Headers are written first and files get their full size at once (so that a full disk shows before the work); every
tensor then goes straight to its place, in any order. Safetensors files are those that its library would write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from whit.checkpoint.header import Entry, byte_view, count_parameters, encode_header, file_order, read_bytes
from whit.checkpoint.reader import INDEX, SINGLE, Tensors
from whit.tensor import TensorSpec

CHUNK = 8 << 20  # bytes copied or hashed at a time


@dataclass(frozen=True)
class Shard:
    """One file to be written: what stands before the tensors, where in the file each begins, and its whole size."""

    name: str
    header: bytes
    starts: Mapping[str, int]
    specs: Mapping[str, TensorSpec]
    size: int


def safetensors_shard(name: str, specs: Mapping[str, TensorSpec]) -> Shard:
    """A file as the safetensors library would write it."""
    ordered = file_order(specs)
    header, starts = encode_header(ordered)
    return Shard(name, header, starts, ordered, len(header) + sum(spec.nbytes for spec in ordered.values()))


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
        return (safetensors_shard(SINGLE, groups[0]),)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return tuple(safetensors_shard(name, group) for name, group in zip(names, groups, strict=True))


def index_json(shards: tuple[Shard, ...]) -> dict[str, bytes]:
    """The index that several safetensors files need, by file name."""
    if len(shards) == 1 or not all(shard.name.endswith(".safetensors") for shard in shards):
        return {}
    total = sum(shard.size - len(shard.header) for shard in shards)
    parameters = sum(count_parameters(shard.specs) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    return {INDEX: (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()}


class Written:
    """Planned shards in a folder, as far as they are written: `read` gives a tensor as it lies in the file now."""

    flags = os.O_RDONLY

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        self._places: dict[str, tuple[int, int, int]] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._descriptors: list[int] = []
        for shard in shards:
            self._descriptors.append(os.open(folder / shard.name, self.flags, 0o644))
            for name, start in shard.starts.items():
                self._places[name] = (self._descriptors[-1], start, shard.specs[name].nbytes)
            self._specs |= shard.specs

    def read(self, name: str) -> Tensor:
        """A tensor, read into fresh memory."""
        descriptor, start, size = self._places[name]
        data = torch.empty(size, dtype=torch.uint8)
        read_bytes(descriptor, byte_view(data), start, Path(name))
        return data.view(self._specs[name].dtype).reshape(self._specs[name].shape)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Writer(Written):
    """`write` and `copy` may be called in any order and again after a restart."""

    flags = os.O_RDWR | os.O_CREAT

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        super().__init__(folder, shards)
        for descriptor, shard in zip(self._descriptors, shards, strict=True):
            _allocate(descriptor, shard.size)
            _write_bytes(descriptor, memoryview(shard.header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place."""
        descriptor, start, size = self._places[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert data.numel() == size, f"{name}: {data.numel()} bytes where {size} were planned"
        _write_bytes(descriptor, byte_view(data), start)

    def copy(self, name: str, source: Tensors, entry: Entry, seen: Callable[[Tensor], None]) -> None:
        """Copy a tensor's bytes from another file, a few at a time; each part (values,) is shown to `seen` first."""
        descriptor, start, size = self._places[name]
        assert entry.stop - entry.start == size, f"{name}: {entry.stop - entry.start} bytes where {size} were planned"
        buffer = memoryview(bytearray(min(CHUNK, size)))
        for done in range(0, size, CHUNK):
            part = buffer[: size - done]
            read_bytes(source.descriptor(entry.path), part, entry.start + done, entry.path)
            seen(torch.frombuffer(part, dtype=entry.spec.dtype))
            _write_bytes(descriptor, part, start + done)

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        for descriptor in self._descriptors:
            getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has none


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its full size; on macOS its room on the disk is not taken with it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


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
