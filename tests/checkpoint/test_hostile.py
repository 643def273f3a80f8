"""Headers of safetensors files, damaged at random: read whole or refused in one sentence, never a crash."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from whit.checkpoint.header import read_header
from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError

GOOD = save({"a": torch.zeros(3, 5), "b.weight": torch.ones(4, dtype=torch.int8)}, {"format": "pt"})
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", ""]) | JUNK,
        "shape": st.lists(st.integers(-2, 1 << 65), max_size=4) | JUNK,
        "data_offsets": st.lists(st.integers(-2, 1 << 65), max_size=3) | JUNK,
    },
)


def checked(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        entries = read_header(path)
        assert sum(entry.stop - entry.start for entry in entries.values()) < len(content)
        with Checkpoint(folder) as checkpoint:
            assert all(checkpoint[name].shape == torch.Size(entry.spec.shape) for name, entry in entries.items())


@given(place=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_bytes_changed_and_cut_off(place: int, byte: int, cut: int, tmp_path_factory: pytest.TempPathFactory):
    changed = bytearray(GOOD)
    changed[place] = byte
    checked(bytes(changed[: cut or None]), tmp_path_factory.mktemp("bytes"))


@given(header=st.dictionaries(st.text(max_size=4), TENSORS, max_size=4) | JUNK, data=st.binary(max_size=40))
def test_headers_of_anything(header: object, data: bytes, tmp_path_factory: pytest.TempPathFactory):
    text = json.dumps(header).encode()
    checked(len(text).to_bytes(8, "little") + text + data, tmp_path_factory.mktemp("header"))


@given(length=st.integers(0, (1 << 64) - 1), data=st.binary(max_size=40))
def test_lengths_of_anything(length: int, data: bytes, tmp_path_factory: pytest.TempPathFactory):
    checked(length.to_bytes(8, "little") + data, tmp_path_factory.mktemp("length"))
