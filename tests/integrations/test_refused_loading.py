"""What cannot be loaded is said in one sentence: formats that do not fit, broken files, weights that are not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loading_helpers import INT4, load, packed_copy
from safetensors.torch import load_file, save_file

import whit
from whit.errors import CheckpointError, FormatError, NonFiniteError, RecipeError

from tiny_models import save_tiny


def test_everything_that_does_not_fit_is_said_at_once(llama: Path):
    with pytest.raises(RecipeError) as caught:
        load(llama, quantization_config=whit.QuantizationConfig("int4-g48", rules=[("*down_projs", "int8")]))
    message = str(caught.value)
    assert "rule '*down_projs': matches no module of the model" in message
    assert "in_features 64 is not divisible by group_size 48; use int4-g32" in message
    assert "in_features 128 is not divisible by group_size 48; use int4-g32" in message


def test_what_is_broken_is_said_in_one_sentence(llama: Path):
    packed = packed_copy(llama)
    weights, config = packed / "model.safetensors", packed / "config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())
    save_file({k: t for k, t in tensors.items() if "0.mlp.up_proj.scale" not in k}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"0.mlp.up_proj.scale: not in the weight files \(1 packed"):
        load(packed)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        load(packed)
    weights.write_bytes(whole)
    values["quantization_config"]["formats"] = {"nothing": "int8"}
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="none of the 1 quantized modules exists in LlamaForCausalLM"):
        load(packed)
    values["quantization_config"]["formats"] = {"model.layers.0.mlp.up_proj": "int99"}
    config.write_text(json.dumps(values))
    with pytest.raises(FormatError, match="'int99' is not a format"):
        load(packed)
    values["quantization_config"]["layout"] = "tiles"
    config.write_text(json.dumps(values))
    with pytest.raises(FormatError, match="layout 'tiles' is not known"):
        load(packed)


def test_weights_that_are_not_finite_are_named(tmp_path: Path):
    original = save_tiny(tmp_path, "gpt2")
    tensors = load_file(original / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")
    tensors["transformer.h.1.mlp.c_proj.weight"][7, 2] = float("inf")
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError) as caught:
        load(original, "gpt2", quantization_config=INT4)
    first, second = str(caught.value).splitlines()
    assert first.startswith("transformer.h.1.mlp.c_fc.weight: nan at position [3, 5]")
    assert second.startswith("transformer.h.1.mlp.c_proj.weight: inf at position [7, 2]")
