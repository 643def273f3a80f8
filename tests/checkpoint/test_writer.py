"""Shards are those that the safetensors library writes, whatever the order in which tensors come."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from whit.checkpoint.header import DTYPES
from whit.checkpoint.reader import Checkpoint
from whit.checkpoint.writer import Writer, index_json, plan_shards
from whit.tensor import TensorSpec

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\', exclude_categories=["C"]), min_size=1, max_size=9
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def random_tensor(spec: TensorSpec) -> torch.Tensor:
    data = torch.randint(0, 2 if spec.dtype == torch.bool else 256, (spec.nbytes,), dtype=torch.uint8)
    return data.view(spec.dtype).reshape(spec.shape)


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


@given(specs=st.dictionaries(NAMES, st.builds(TensorSpec, SHAPES, st.sampled_from(list(DTYPES.values()))), min_size=1))
def test_the_same_bytes_as_the_library(specs: dict[str, TensorSpec], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("out")
    tensors = {name: random_tensor(spec) for name, spec in specs.items()}
    shards = plan_shards(specs.items(), 1 << 30)
    writer = Writer(folder, shards)
    for name in reversed(list(tensors)):
        writer.write(name, tensors[name])
    writer.close()
    assert (folder / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})
    assert (folder / "model.safetensors").stat().st_size == shards[0].size


def test_systems_without_linuxs_own_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """macOS has neither; every run ended with an AttributeError there."""
    for name in ("posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name)
    tensors = {"a": torch.ones(3)}
    with Writer(tmp_path, plan_shards(specs_of(tensors).items(), 100)) as writer:
        assert isinstance(writer, Writer)
        writer.write("a", tensors["a"])
        writer.sync()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensors["a"])


def test_several_shards_and_their_index(tmp_path: Path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)} | {"large": torch.ones(50)}
    shards = plan_shards(specs_of(tensors).items(), limit=100)
    assert [set(shard.specs) for shard in shards] == [{"t0", "t1"}, {"t2", "t3"}, {"t4", "t5"}, {"t6"}, {"large"}]
    writer = Writer(tmp_path, shards)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    for name, content in index_json(shards).items():
        (tmp_path / name).write_bytes(content)
        assert json.loads(content)["metadata"] == {"total_parameters": 120, "total_size": 480}
    with Checkpoint(tmp_path) as checkpoint:
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in tensors.items())
    assert load_file(tmp_path / "model-00005-of-00005.safetensors")["large"].sum() == 50


def test_a_copy_is_the_same_bytes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("whit.checkpoint.writer.CHUNK", 12)
    (tmp_path / "in").mkdir()
    tensors = {"a": torch.arange(20, dtype=torch.float32), "none": torch.zeros(0)}
    (tmp_path / "in/model.safetensors").write_bytes(save(tensors))
    writer = Writer(tmp_path, plan_shards(specs_of(tensors).items(), 1 << 20))
    seen: list[torch.Tensor] = []
    with Checkpoint(tmp_path / "in") as source:
        for name in source:
            writer.copy(name, source, source.entries[name], lambda part: seen.append(part.clone()))
    writer.close()
    assert torch.equal(torch.cat(seen), tensors["a"])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensors["a"])


def test_a_tensor_that_was_not_planned_so_is_refused(tmp_path: Path):
    writer = Writer(tmp_path, plan_shards([("a", TensorSpec((3,), torch.float32))], 1 << 20))
    with pytest.raises(AssertionError, match="8 bytes where 12 were planned"):
        writer.write("a", torch.ones(2))
    writer.close()
