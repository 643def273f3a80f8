"""Checkpoints in fine-grained FP8: weights are those that transformers' own rule gives, experts among them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import whit
from whit.errors import CheckpointError
from whit.export.readers import quant_method
from whit.integrations.loading import load_causal_lm
from whit.pipeline.job import open_source

from tiny_models import save_tiny

TILE = (48, 32)  # of 64 and 128 columns: the last tiles of rows are shorter


def tiles(folder: Path, architecture: str = "llama", **said: object) -> dict[str, torch.Tensor]:
    """A checkpoint whose projections are in tiles; what they stand for, by stored name."""
    save_tiny(folder, architecture)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = (math.ceil(n / size) for n, size in zip(weight.shape, TILE, strict=True))
        scale = torch.rand(rows, columns) * 0.01 + 1e-3
        wide = scale.repeat_interleave(TILE[0], 0).repeat_interleave(TILE[1], 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        meant[name] = tensors[name].float() * wide
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(TILE), **said,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_weights_are_bytes_times_the_scales_of_their_tiles(architecture: str, tmp_path: Path):
    meant = tiles(tmp_path / "model", architecture)
    source = open_source(tmp_path / "model")
    for name, weight in meant.items():
        if name in source.origins:
            assert torch.equal(source.read(name), weight)
    account = whit.quantize(tmp_path / "model", tmp_path / "out", "int8-g32")
    assert account.counts()["quantized"] == (12 if architecture == "qwen3_moe" else 14)
    assert all(entry.relative_error < 0.02 for entry in account.parameters if entry.status == "quantized")
    assert quant_method(json.loads((tmp_path / "out/config.json").read_text())) == "whit"
    whit.pipeline.dequantize(tmp_path / "model", tmp_path / "plain")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found, plain = (load_causal_lm(str(tmp_path / f), dtype="float32")(ids).logits for f in ("model", "plain"))
    assert (found - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [({"weight_block_size": [64, 64]}, "one for each"), ({"weight_block_size": [0, 3]}, "must be two sizes")],
)
def test_tiles_that_do_not_fit_are_said(said: dict[str, object], sentence: str, tmp_path: Path):
    tiles(tmp_path / "model", **said)
    with pytest.raises(CheckpointError, match=sentence):
        open_source(tmp_path / "model")


def test_stacked_experts_are_refused(tmp_path: Path):
    tiles(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scale_inv"] = torch.ones(2, 1, 1)
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="each must be a linear of its own"):
        open_source(tmp_path / "model")
