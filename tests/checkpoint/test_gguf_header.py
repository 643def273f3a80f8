"""GGUF headers read with suspicion: whole ones as gguf-py reads them, damaged ones in one sentence."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whit.checkpoint.gguf import ARRAY, STRING, TYPES, read_gguf
from whit.errors import CheckpointError
from whit.export.gguf.header import Info, gguf_shard
from whit.tensor import TensorSpec

METADATA = {
    "general.architecture": "llama", "a.count": 7, "a.below": -3, "a.long": 1 << 40, "a.real": 0.5, "a.flag": True,
    "a.words": ["x", "", "ü", "long" * 9], "a.numbers": [1, -2, 3], "a.reals": [0.25, 0.5],
}  # fmt: skip


def whole_file(path: Path) -> bytes:
    """Two float tensors and one of Q4_0."""
    specs = [
        Info("one", (3, 4), 0, TensorSpec((3, 4), torch.float32)),
        Info("two", (5,), 1, TensorSpec((5,), torch.float16)),
        Info("three", (2, 64), 2, TensorSpec((2, 36), torch.uint8)),
    ]
    shard = gguf_shard("m.gguf", METADATA, {}, specs)
    content = bytearray(shard.header + bytes(shard.size - len(shard.header)))
    content[shard.starts["one"] : shard.starts["one"] + 48] = np.arange(12, dtype="<f4").tobytes()
    path.write_bytes(content)
    return bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return whole_file(tmp_path_factory.mktemp("gguf") / "m.gguf")


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_header_is_what_gguf_py_reads(tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
    whole_file(tmp_path / "m.gguf")
    ours, theirs = read_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert list(ours.metadata) == [key for key in theirs.fields if not key.startswith("GGUF.")]
    for key, value in METADATA.items():
        found = ours.metadata[key]
        assert (list(found) if isinstance(value, list) else found) == value
        assert theirs.fields[key].contents() == value
    assert [(t.name, t.shape, t.type, t.start) for t in ours.tensors.values()] == [
        (t.name, tuple(t.shape.tolist()[::-1]), t.tensor_type.name, t.data_offset) for t in theirs.tensors
    ]


def test_types_are_ggmls():
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
    for member, (columns, size) in gguf.GGML_QUANT_SIZES.items():
        assert TYPES[member.value] == (member.name, columns, size)


def test_every_truncation_is_said(tmp_path: Path, whole: bytes):
    """The last 24 bytes only fill up to the alignment."""
    for length in range(len(whole) - 24):
        assert refused(tmp_path / "m.gguf", whole[:length])


def header(pairs: int, tensors: int, rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(("content", "says"), [
    (b"GGML" + bytes(60), 'does not begin with "GGUF"'),
    (header(0, 0, b"", version=1), "version 1; whit reads"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian; whit reads"),
    (header(1 << 60, 0, b""), "key-values at byte 24 needs"),
    (header(0, 1 << 60, b""), "tensors and 0 key-values at byte 24 needs"),
    (header(1, 0, struct.pack("<Q", 1 << 62) + bytes(30)), "a key at byte 32 claims"),
    (header(1, 0, string(b"k") + struct.pack("<IQ", STRING, 1 << 50) + bytes(9)), "the value of 'k'"),
    (header(1, 0, string(b"k") + struct.pack("<IIQ", ARRAY, STRING, 1 << 50) + bytes(9)), "strings of 'k'"),
    (header(1, 0, string(b"k") + struct.pack("<IIQ", ARRAY, 12, 1 << 60) + bytes(9)), "values of 'k'"),
    (header(1, 0, string(b"k") + struct.pack("<IIQ", ARRAY, ARRAY, 3) + bytes(99)), "array of type 9"),
    (header(1, 0, string(b"k") + struct.pack("<I", 13) + bytes(9)), "has type 13"),
    (header(2, 0, 2 * (string(b"k") + struct.pack("<II", 4, 1))), "'k' is there twice"),
    (header(1, 0, string(b"\xff\xfe") + bytes(9)), "is not UTF-8"),
    (header(1, 0, string(b"general.alignment") + struct.pack("<II", 4, 12) + bytes(9)), "power of two"),
    (header(0, 1, tensor(b"t", (1,) * 5, 0, 0) + bytes(99)), "5 dimensions"),
    (header(0, 1, tensor(b"t", (4,), 5, 0) + bytes(99)), "type 5, which whit does not know"),
    (header(0, 1, tensor(b"t", (48,), 2, 0) + bytes(99)), "whole groups of 32"),
    (header(0, 1, tensor(b"t", (4,), 0, 16) + bytes(99)), "a multiple of 32"),
    (header(0, 1, tensor(b"t", (1 << 62, 1 << 62), 0, 0) + bytes(99)), "elements are the most"),
    (header(0, 1, tensor(b"t", (4,), 0, 1 << 50) + bytes(99)), "ends at byte"),
    (header(0, 2, tensor(b"t", (16,), 0, 0) + tensor(b"u", (16,), 0, 32) + bytes(299)), "'u' overlaps 't'"),
    (header(0, 2, 2 * tensor(b"t", (4,), 0, 0) + bytes(99)), "'t' is there twice"),
])  # fmt: skip
def test_damage_is_said(content: bytes, says: str, tmp_path: Path):
    assert says in refused(tmp_path / "m.gguf", content)


def one_sentence_or_ends(path: Path) -> int:
    """Where the last tensor ends; -1 where the file is refused in one sentence."""
    try:
        return max((t.stop for t in read_gguf(path).tensors.values()), default=0)
    except CheckpointError as error:
        return len(path.read_bytes()) + 1 if "\n" in str(error) else -1


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_files_never_crash(data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory):
    """Bytes changed anywhere: read, or refused in one sentence; a number in the file never sizes the memory."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 9))
        content[place : place + 8] = data.draw(st.sampled_from([
            bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))]) + content[place + 1 : place + 8],
            struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))), b"\xff" * 8,
            struct.pack("<Q", len(whole)), bytes(8),
        ]))  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert one_sentence_or_ends(path) <= len(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kilobytes


@given(rest=st.binary(max_size=200), pairs=st.integers(0, 2**64 - 1), tensors=st.integers(0, 2**64 - 1))
@example(rest=b"", pairs=0, tensors=0)
def test_noise_never_crashes(rest: bytes, pairs: int, tensors: int, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    for counts in ((pairs, tensors), (pairs % 4, tensors % 4)):
        path.write_bytes(header(*counts, rest))
        assert one_sentence_or_ends(path) <= path.stat().st_size
