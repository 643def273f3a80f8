"""The header of a GGUF file, read with suspicion: every count and length is held against what the file has left.

"GGUF", uint32 version, uint64 tensors, uint64 key-values; then key-values and tensor infos (ggml's include/gguf.h).
Nothing is allocated by a number in the file that its bytes do not back, so that damage is one sentence, never a crash
and never a wrong tensor.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, overload

import numpy as np

from whit.errors import CheckpointError

# ggml's types: number to name, columns of a group and its bytes.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
SMALLEST_PAIR, SMALLEST_INFO, MAX_DIMENSIONS = 13, 24, 4
MAX_NAME = 1 << 16  # bytes of a key or a name
MAX_COUNT = 1 << 18  # tensors, and key-values: each becomes an object here
MAX_ELEMENTS = 1 << 62  # of a tensor, empty dimensions aside: what a place in memory can count


class Strings(Sequence[str]):
    """An array of strings, as bytes; decoded one at a time."""

    def __init__(self, data: bytes, ends: array[int]) -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._data[start : self._ends[index]].decode("utf-8", errors="replace")


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: bytes [start, stop) of `path`. `shape` as torch has it, `type` is ggml's name."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the data. Numeric arrays are numpy arrays, arrays of strings are `Strings`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file, and the other parts of the model, where it lies in several."""
        return tuple(dict.fromkeys([self.path, *(tensor.path for tensor in self.tensors.values())]))


def read_gguf(path: Path) -> GgufHeader:
    """The header of a file; CheckpointError where the file cannot be trusted."""
    with path.open("rb") as file:
        reader = _Reader(path, file, path.stat().st_size)
        if reader.take(4, "the magic") != b"GGUF":
            raise reader.error('does not begin with "GGUF"; a GGUF file must; get another copy')
        version = reader.number("<I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            what = "big-endian" if swapped else f"version {version}"
            raise reader.error(f"{what}; whit reads little-endian versions 2 and 3; convert it with llama.cpp")
        tensors = reader.number("<Q", "the number of tensors")
        pairs = reader.number("<Q", "the number of key-values")
        reader.must_hold(pairs * SMALLEST_PAIR + tensors * SMALLEST_INFO, f"{tensors} tensors and {pairs} key-values")
        if max(pairs, tensors) > MAX_COUNT:
            raise reader.error(f"{tensors} tensors and {pairs} key-values; {MAX_COUNT} are the most; get another copy")
        metadata = _metadata(reader, pairs)
        infos = [_info(reader) for _ in range(tensors)]
        return GgufHeader(path, metadata, _placed(reader, metadata, infos))


class _Reader:
    """Forward through the file, never past its end."""

    def __init__(self, path: Path, file: Any, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self._file = file

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def must_hold(self, count: int, what: str) -> None:
        left = self.size - self.position
        if count > left:
            raise self.error(
                f"{what} at byte {self.position} needs {count} bytes and the file has {left} left; it must be whole; "
                "download it again"
            )

    def take(self, count: int, what: str) -> bytes:
        self.must_hold(count, what)
        data: bytes = self._file.read(count)
        if len(data) != count:
            raise self.error(f"ends within {what}; it must not change while it is read; run again")
        self.position += count
        return data

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def text(self, what: str, most: int | None = None) -> bytes:
        length = self.number("<Q", what)
        if most is not None and length > most:
            raise self.error(
                f"{what} at byte {self.position} claims {length} bytes; {most} are the most; get another copy"
            )
        return self.take(length, what)

    def name(self, what: str) -> str:
        try:
            return self.text(what, MAX_NAME).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} before byte {self.position} is not UTF-8; it must be; get another copy") from None


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = reader.name("a key")
        if key in found:
            raise reader.error(f"key {key!r} is there twice; keys must be unique; get another copy")
        kind = reader.number("<I", f"the type of {key!r}")
        found[key] = _array(reader, key) if kind == ARRAY else _scalar(reader, kind, key)
    return found


def _scalar(reader: _Reader, kind: int, key: str) -> Any:
    if kind == STRING:
        return reader.text(f"the value of {key!r}").decode("utf-8", errors="replace")
    if kind not in SCALARS:
        raise reader.error(f"{key!r} has type {kind}; types go from 0 to 12; get another copy")
    return reader.number(SCALARS[kind], f"the value of {key!r}")


def _array(reader: _Reader, key: str) -> Any:
    kind = reader.number("<I", f"the type of {key!r}")
    count = reader.number("<Q", f"the length of {key!r}")
    if kind in SCALARS:
        width = struct.calcsize(SCALARS[kind])
        data = reader.take(count * width, f"the {count} values of {key!r}")
        return np.frombuffer(data, dtype=np.dtype("bool" if kind == 7 else SCALARS[kind]))
    if kind != STRING:
        raise reader.error(f"{key!r} is an array of type {kind}; numbers and strings can be; get another copy")
    reader.must_hold(8 * count, f"the {count} strings of {key!r}")
    parts, ends, total = bytearray(), array("Q"), 0
    for _ in range(count):
        text = reader.text(f"a string of {key!r}")
        parts += text
        total += len(text)
        ends.append(total)
    return Strings(bytes(parts), ends)


def _info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """name, shape, type, offset"""
    name = reader.name("a tensor's name")
    count = reader.number("<I", f"the dimensions of {name!r}")
    if not 0 < count <= MAX_DIMENSIONS:
        raise reader.error(f"{name!r} has {count} dimensions; 1 to {MAX_DIMENSIONS} there can be; get another copy")
    shape = struct.unpack(f"<{count}Q", reader.take(8 * count, f"the dimensions of {name!r}"))[::-1]
    return name, shape, reader.number("<I", f"the type of {name!r}"), reader.number("<Q", f"the place of {name!r}")


def _placed(
    reader: _Reader, metadata: Mapping[str, Any], infos: Sequence[tuple[str, tuple[int, ...], int, int]]
) -> dict[str, GgufTensor]:
    """Tensors in the order of the file; each must lie inside it and beside all others."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise reader.error(
            f"general.alignment {alignment!r}; it must be a power of two from 8 to 65536; get another copy"
        )
    data = reader.position + -reader.position % alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, number, offset in infos:
        if name in found:
            raise reader.error(f"{name!r} is there twice; names must be unique; get another copy")
        if number not in TYPES:
            raise reader.error(f"{name!r} has ggml's type {number}, which whit does not know; update whit")
        kind, columns, size = TYPES[number]
        if shape[-1] % columns or offset % alignment:
            raise reader.error(
                f"{name!r}, {kind} {list(shape)} at {offset}: rows must be whole groups of {columns} and the place a "
                f"multiple of {alignment}; get another copy"
            )
        if prod(count or 1 for count in shape) >= MAX_ELEMENTS:
            raise reader.error(f"{name!r} is {list(shape)}; {MAX_ELEMENTS} elements are the most; get another copy")
        start = data + offset
        stop = start + prod(shape) // columns * size
        if stop > reader.size:
            raise reader.error(
                f"{name!r} ends at byte {stop} and the file has {reader.size}; it must be whole; download it again"
            )
        found[name] = GgufTensor(reader.path, name, shape, kind, start, stop)
    last: GgufTensor | None = None
    for tensor in sorted(found.values(), key=lambda t: (t.start, t.stop)):
        if last is not None and tensor.start < last.stop:
            raise reader.error(f"{tensor.name!r} overlaps {last.name!r}; tensors must lie apart; get another copy")
        last = tensor if tensor.stop > tensor.start else last
    return found
