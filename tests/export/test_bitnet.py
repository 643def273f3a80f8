"""Checkpoints of BitNet b1.58: as transformers' own packing and linears have them, both of their conventions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.bitnet import pack_weights

import whit
from whit.errors import CheckpointError
from whit.integrations.loading import load_causal_lm
from whit.pipeline.job import open_source

from tiny_models import save_tiny

KINDS = {"bitlinear": lambda codes, scale: codes / scale, "autobitlinear": lambda codes, scale: codes * scale}


def bitnet(folder: Path, kind: str, random: torch.Generator) -> dict[str, torch.Tensor]:
    """A checkpoint packed by transformers' own function; what its linears stand for."""
    save_tiny(folder, "llama")
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes = torch.randint(-1, 2, tensors[name].shape, generator=random).float()
        scale = 0.5 + torch.rand(1, generator=random)
        meant[name] = KINDS[kind](codes, scale)
        tensors[name] = pack_weights(codes.clone())
        tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def eight_bits(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """BitLinear's activations: round(x 127 / max|x|) per token, and back."""
    (x,) = inputs
    scale = 127 / x.abs().amax(-1, keepdim=True)
    return ((x * scale).round() / scale,)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_transformers(kind: str, tmp_path: Path, random: torch.Generator):
    meant = bitnet(tmp_path / "model", kind, random)
    source = open_source(tmp_path / "model")
    for name, weight in meant.items():
        assert str(source.format(name)) == "ternary-channel"
        assert torch.allclose(source.quantized(name).dequantize(), weight, rtol=1e-6, atol=0)
    model = load_causal_lm(str(tmp_path / "model"))
    plain = whit.integrations.loading.load_causal_lm(str(save_tiny(tmp_path / "plain", "llama")))
    for name, weight in meant.items():
        plain.get_parameter(name).data = weight
        plain.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(eight_bits)
    tokens = torch.arange(3, 23)[None]
    found, wanted = model(tokens).logits, plain(tokens).logits
    # Where an input lies between two of the 255 levels, sums in another order may choose the other one.
    assert (found - wanted).abs().mean() < 2e-3 * wanted.abs().mean()
    for name in meant:
        assert str(model.get_submodule(name.removesuffix(".weight")).activations) == "int8"


def test_what_is_damaged_is_said(tmp_path: Path, random: torch.Generator):
    bitnet(tmp_path / "model", "bitlinear", random)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name] | 3
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="code 3"):
        open_source(tmp_path / "model").read(name)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["quantization_mode"] = "online"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"online.* --format ternary-tensor-absmean"):
        open_source(tmp_path / "model")
