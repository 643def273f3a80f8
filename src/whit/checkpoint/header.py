"""The header of a safetensors file: 8 bytes little-endian length, that many bytes of JSON, then the tensors.

Everything is checked here, before a byte of data is read, so that damage is one sentence and never a wrong tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.errors import CheckpointError
from whit.tensor import TensorSpec

# In the order in which the safetensors library stores them: wide types first, so that all are aligned.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16,
    "I16": torch.int16, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_COUNT = 1 << 62  # elements, and bytes


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [start, stop) of a file."""

    path: Path
    spec: TensorSpec
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """Name to Entry for every tensor of a file; CheckpointError where the file cannot be trusted."""
    return read_description(path)[0]


def read_description(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """As `read_header`, and what the header says beside its tensors."""
    header, data = _header(path)
    metadata = dict(header.pop("__metadata__", None) or {})
    entries = {name: _entry(path, name, value, data) for name, value in header.items()}
    _check_extents(path, entries, data, path.stat().st_size)
    return entries, metadata


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of a file, and where its tensors begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes and the file has {size}; it must be whole; download it again"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes; it must be below {MAX_HEADER}; get another copy"
            )
        raw = file.read(length)
    return _parse(path, raw), 8 + length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(
                f"{path}: {twice} is listed twice; names must be unique; get another copy of the file"
            )
        return found

    def constant(text: str) -> None:
        raise ValueError(f"{text} is not a number of JSON")

    def integer(text: str) -> int | float:
        return -0.0 if text == "-0" else int(text)  # -0 is no count to any other reader

    try:  # decoded here: given bytes, Python's json would take UTF-16 and UTF-32 too, which no other reader does
        text = raw.decode("utf-8")
        header = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
        if "\\u" in text:  # halves of surrogate pairs, spelt as escapes
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not JSON ({error}); it must be; get another copy of the file"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; it must be one; get another copy of the file")
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ does not map names to text; it must; get another copy of the file")
    return header


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    """The Entry that a header's value describes; `data` is where tensors begin."""
    where = f"{path}: {name}"
    if not isinstance(value, dict) or not _is_shape(value.get("shape")) or not _are_counts(value.get("data_offsets")):
        raise CheckpointError(
            f"{where} has no valid shape and data_offsets; both must be lists of counts; get another copy"
        )
    if not isinstance(value.get("dtype"), str) or value["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{where} has dtype {value.get('dtype')!r}; it must be one of {', '.join(DTYPES)}; convert it"
        )
    spec = TensorSpec(tuple(value["shape"]), DTYPES[value["dtype"]])
    offsets = value["data_offsets"]
    if len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
        raise CheckpointError(
            f"{where} has data_offsets {offsets}; its shape {list(spec.shape)} needs {spec.nbytes} bytes; "
            "get another copy"
        )
    return Entry(path, spec, data + offsets[0], data + offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < MAX_COUNT for v in value)


def _is_shape(value: Any) -> bool:
    """Whether these are counts whose product is one too, whichever of them is 0."""
    return _are_counts(value) and prod(v or 1 for v in value) < MAX_COUNT


def _check_extents(path: Path, entries: Mapping[str, Entry], data: int, size: int) -> None:
    """Tensors must lie end to end and fill the file."""
    position, last = data, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: {name} {kind} {last}; tensors must lie end to end; get another copy of the file"
            )
        position, last = entry.stop, name
    if position > size:
        raise CheckpointError(
            f"{path}: truncated, {size} bytes where the header needs {position}; it must be whole; download it again"
        )
    if position < size:
        raise CheckpointError(
            f"{path}: {size - position} bytes after the last tensor; there must be none; get another copy"
        )


def file_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The order of the safetensors library: wide types first, then by name."""
    return dict(sorted(specs.items(), key=lambda item: (RANK[item[1].dtype], item[0])))


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes for tensors in `file_order`, and where in the file each begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    for name, spec in specs.items():
        starts[name], stop = position, position + spec.nbytes
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + start for name, start in starts.items()}


def count_parameters(specs: Mapping[str, TensorSpec]) -> int:
    """Elements of all tensors."""
    return sum(prod(spec.shape) for spec in specs.values())


def byte_view(data: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the CPU."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


def read_bytes(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from a file; unlike a memory map this leaves no pages in the process."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{path}: ends at byte {offset + done}; it must not change while it is read; run again"
            )
        done += count
