"""optimum-quanto's files, made by hand from their description; and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import whit
from whit.errors import CheckpointError
from whit.pipeline.job import open_source

from tiny_models import save_tiny

NAME = "model.layers.0.mlp.up_proj.weight"


def written(folder: Path, kind: str, random: torch.Generator, map_name: str = "quanto_qmap.json") -> dict[str, Tensor]:
    """A model whose linears but the head are quantized so; the weights that they stand for."""
    save_tiny(folder, "llama")
    tensors, said, meant = load_file(folder / "model.safetensors"), {}, {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        if kind == "qint8":
            codes = torch.randint(-128, 128, (rows, columns), generator=random, dtype=torch.int8)
            scale = torch.rand(rows, 1, generator=random)
            meant[name], stored = codes * scale, {"_data": codes, "_scale": scale}
        else:
            bits, size = int(kind[4]), 16
            count, each = rows * columns // size, 8 // bits
            codes = torch.randint(0, 1 << bits, (count, size), generator=random, dtype=torch.uint8)
            lines = codes.reshape(each, -1, size)
            packed = sum(lines[place].int() << bits * place for place in range(each)).to(torch.uint8)
            scale, shift = (torch.rand(count, 1, generator=random).to(torch.bfloat16) for _ in range(2))
            shift = torch.randint(0, 4, (count, 1), generator=random).to(torch.int8) if kind.endswith("z") else shift
            steps = codes - shift.float() if kind.endswith("z") else codes.float()
            floats = steps * scale.float() - (0 if kind.endswith("z") else shift.float())
            meant[name] = floats.reshape(rows, columns)
            stored = {"_data._data": packed, "_scale": scale, "_shift": shift}
        tensors |= {f"{name}.{key}": value for key, value in stored.items()}
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{key}": torch.tensor(1.0) for key in ("input_scale", "output_scale")}
        said[module] = {"weights": kind.removesuffix("z"), "activations": "none"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / map_name).write_text(json.dumps(said))
    return meant


@pytest.mark.parametrize("map_name", ["quanto_qmap.json", "quantization_map.json"])
@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("qint8", "int8-channel"),
        ("qint4", "int4-g16-offset"),
        ("qint2", "int2-g16-offset"),
        ("qint4z", "int4-g16-asym"),
    ],
)
def test_weights(kind: str, format: str, map_name: str, tmp_path: Path, random: torch.Generator):
    meant = written(tmp_path / "model", kind, random, map_name)
    source = open_source(tmp_path / "model")
    for name, weight in meant.items():
        assert str(source.format(name)) == format
        assert torch.equal(source.read(name), weight), name
    whit.quantize(tmp_path / "model", tmp_path / "out", "q4_0")
    assert not list((tmp_path / "out").glob("qu*map.json"))  # which would be untrue of it
    assert str(open_source(tmp_path / "out").format(NAME)) == "q4_0"


DAMAGE = {
    "_scale": ("is missing", None),
    "_data._data": ("4-g32|fit together|bytes with", torch.zeros(3, 16, dtype=torch.uint8)),
    "_shift": ("scales and 1 shifts|one of each", torch.zeros(1, 1)),
}


@pytest.mark.parametrize("key", DAMAGE)
def test_what_is_damaged_is_said(key: str, tmp_path: Path, random: torch.Generator):
    written(tmp_path, "qint4", random)
    tensors = load_file(tmp_path / "model.safetensors")
    said, value = DAMAGE[key]
    del tensors[f"{NAME}.{key}"]
    if value is not None:
        tensors[f"{NAME}.{key}"] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path)


def test_a_map_that_lacks_a_module(tmp_path: Path, random: torch.Generator):
    written(tmp_path, "qint4", random)
    (tmp_path / "quanto_qmap.json").write_text("{}")
    with pytest.raises(CheckpointError, match="map says weights None"):
        open_source(tmp_path)
