"""The part of a GGUF file that stands before the tensors: "GGUF", version 3, counts, key-values, tensor infos.

All integers are little-endian. A string is a uint64 length and UTF-8 bytes. A value has its type before it; an array
has the type of its elements and their number. A tensor info is a name, the number of dimensions, the dimensions with
the fastest first, ggml's type and the offset from the end of the header, which is padded to the alignment.
(ggml's include/gguf.h)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from whit.checkpoint.writer import Shard
from whit.tensor import TensorSpec

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | Sequence[Scalar]
Metadata: TypeAlias = Mapping[str, Value]

ALIGNMENT = 32
VERSION = 3
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
PACKS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q"}


@dataclass(frozen=True)
class Info:
    """A tensor as the header names it: its logical shape as torch has it, ggml's type, and what lies in the file."""

    name: str
    shape: tuple[int, ...]
    number: int
    spec: TensorSpec


def gguf_shard(name: str, metadata: Metadata, constants: Mapping[Info, bytes], infos: Sequence[Info]) -> Shard:
    """A file of `infos`, in their order, after tensors whose bytes are known already and become part of the header."""
    sizes = [len(content) for content in constants.values()] + [info.spec.nbytes for info in infos]
    offsets, position = [], 0
    for size in sizes:
        offsets.append(position)
        position += _padded(size)
    everything = [*constants, *infos]
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(everything), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    for info, offset in zip(everything, offsets, strict=True):
        dimensions = info.shape[::-1]
        parts.append(_string(info.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", info.number, offset))
    header = b"".join(parts)
    header += bytes(-len(header) % ALIGNMENT)
    start = len(header)
    for content in constants.values():
        header += content + bytes(-len(content) % ALIGNMENT)
    starts = {info.name: start + offset for info, offset in zip(infos, offsets[len(constants) :], strict=True)}
    return Shard(name, header, starts, {info.name: info.spec for info in infos}, start + position)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _type(value: Scalar) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return INT32 if value < 0 else UINT32 if value < 1 << 32 else UINT64
    return FLOAT32 if isinstance(value, float) else STRING


def _scalar(value: Scalar, kind: int) -> bytes:
    return _string(str(value)) if kind == STRING else struct.pack(PACKS[kind], value)


def _value(value: Value) -> bytes:
    if isinstance(value, bool | int | float | str):
        kind = _type(value)
        return struct.pack("<I", kind) + _scalar(value, kind)
    kind = _type(value[0]) if value else STRING
    kind = INT32 if kind == UINT32 else kind  # what llama.cpp writes for token types
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_scalar(v, kind) for v in value)
