"""NVFP4, MXFP4 and MXFP8 in compressed-tensors' files and in ModelOpt's: the values of the former's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import whit
from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.lint import lint
from whit.integrations.loading import load_causal_lm
from whit.pipeline import run
from whit.pipeline.job import Options, open_source
from whit.pipeline.transcode import prepare_transcode

from tiny_models import save_tiny

compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
KINDS = {
    "nvfp4-pack-quantized": ("NVFP4PackedCompressor", 4, 16, "tensor_group"),
    "mxfp4-pack-quantized": ("MXFP4PackedCompressor", 4, 32, "group"),
    "mxfp8-quantized": ("MXFP8QuantizationCompressor", 8, 32, "group"),
}


def scheme_of(kind: str) -> dict[str, Any]:
    _, bits, size, strategy = KINDS[kind]
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size}
    inputs = {**weights, "dynamic": "local" if strategy == "tensor_group" else True}
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs}


def compressed(kind: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, what they stand for), both by compressed-tensors."""
    from compressed_tensors.quantization import QuantizationScheme

    name, bits, size, strategy = KINDS[kind]
    scheme = QuantizationScheme.model_validate(scheme_of(kind))
    largest = weight.reshape(len(weight), -1, size).abs().amax(-1)
    if strategy == "tensor_group":
        state = {"weight_global_scale": 448 * 6 / weight.abs().amax().reshape(1)}
        state["weight_scale"] = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    else:
        state = {"weight_scale": 2.0 ** (largest.log2().floor() - (2 if bits == 4 else 8))}
    compressor = getattr(compressors, name)
    tensors = compressor.compress({"weight": weight, **state}, scheme)
    return {k: v.contiguous() for k, v in tensors.items()}, compressor.decompress(dict(tensors), scheme)["weight"]


def written(folder: Path, kind: str) -> dict[str, Tensor]:
    """A checkpoint whose projections compressed-tensors made; what each stands for."""
    save_tiny(folder, "llama")
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, meant[name] = compressed(kind, tensors.pop(name))
        tensors |= {name.replace("weight", key, 1): tensor for key, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = {
        "quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": scheme_of(kind)},
    }  # fmt: skip
    claim(folder, said)
    return meant


def claim(folder: Path, said: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def near(found: Tensor, wanted: Tensor) -> None:
    """compressed-tensors gives 4-bit floats in bfloat16."""
    torch.testing.assert_close(found, wanted.float(), rtol=2**-7 if wanted.dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_compressed_tensors(kind: str, tmp_path: Path):
    meant = written(tmp_path / "model", kind)
    source = open_source(tmp_path / "model")
    for name, weight in meant.items():
        near(source.read(name), weight)
        assert str(source.format(name)) == ("mxfp4" if kind.startswith("mxfp4") else "None")
    with Checkpoint(tmp_path / "model") as checkpoint:
        findings = lint(tmp_path / "model", json.loads((tmp_path / "model/config.json").read_text()), checkpoint)
    assert not [finding for finding in findings if finding.kind == "problem"]
    account = whit.quantize(tmp_path / "model", tmp_path / "out", "int8-g32")
    assert account.counts()["quantized"] == 14
    assert "dropped" not in account.counts() or account.counts()["dropped"] == 0
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found, wanted = (load_causal_lm(str(tmp_path / f), dtype="float32")(ids).logits for f in ("model", "out"))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_mxfp4_is_kept_without_loss(tmp_path: Path):
    meant = written(tmp_path / "model", "mxfp4-pack-quantized")
    account = run(prepare_transcode(tmp_path / "model", tmp_path / "out", "whit", Options()))
    assert account.counts()["quantized"] == 14
    source = open_source(tmp_path / "out")
    assert all(torch.equal(source.read(name), weight.float()) for name, weight in meant.items())


@pytest.mark.parametrize("kind", ["nvfp4-pack-quantized", "mxfp8-quantized", "fp8"])
def test_modelopts_names(kind: str, tmp_path: Path):
    """Its scale of the whole matrix is a factor, where compressed-tensors has the divisor."""
    folder = tmp_path / "model"
    if kind == "fp8":
        save_tiny(folder, "llama")
        tensors, meant = load_file(folder / "model.safetensors"), {}
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            scale = tensors[name].abs().amax() / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors |= {f"{name}_scale": scale, name.replace("weight", "input_scale"): torch.tensor(0.5)}
            meant[name] = tensors[name].float() * scale
    else:
        meant, tensors = written(folder, kind), {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            name = name.replace("weight_packed", "weight").replace("weight_global_scale", "weight_scale_2")
            tensors[name] = (1 / tensor).reshape(()) if name.endswith("weight_scale_2") else tensor
    before = "model.layers.0.mlp.down_proj"
    tensors[f"{before}.pre_quant_scale"] = 0.5 + torch.rand(meant[f"{before}.weight"].shape[1])
    wanted = meant[f"{before}.weight"]
    meant[f"{before}.weight"] = (wanted * tensors[f"{before}.pre_quant_scale"]).to(wanted.dtype)
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    claim(folder, {"quant_method": "modelopt", "quant_algo": kind.upper(), "ignore": ["lm_head"]})
    source = open_source(folder)
    for name, weight in meant.items():
        near(source.read(name), weight)
    account = whit.quantize(folder, tmp_path / "out", "int8-g32")
    assert account.counts()["quantized"] == 14


def test_what_is_damaged_is_said(tmp_path: Path):
    written(tmp_path / "model", "nvfp4-pack-quantized")
    path, module = tmp_path / "model/model.safetensors", "model.layers.0.mlp.up_proj"
    whole = load_file(path)
    for key, tensor, said in (
        ("weight_scale", whole[f"{module}.weight_scale"][:, 1:].contiguous(), "a scale for each"),
        ("weight_global_scale", torch.ones(3), "has one such number"),
        ("weight_zero_point", torch.ones(3), "zero points"),
    ):
        save_file({**whole, f"{module}.{key}": tensor}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            open_source(tmp_path / "model").read(f"{module}.weight")
