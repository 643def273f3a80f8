"""from_pretrained in its many uses: rules, methods, tasks and ties; and the way back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from loading_helpers import INT4, fake_quantized, load, logits, packed_copy
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import whit
from whit.errors import WhitWarning
from whit.modules import PackedModule, QuantizedEmbedding, QuantizedLinear, TiedHead

from tiny_models import save_tiny, tiny_inputs


def test_what_is_not_to_be_converted_is_kept(llama: Path):
    config = whit.QuantizationConfig("int8", modules_to_not_convert=["mlp", "not_in_this_model"])
    with pytest.warns(WhitWarning, match="'not_in_this_model' is the name of no module"):
        model = load(llama, quantization_config=config)
    kinds = {name.split(".")[3] for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert kinds == {"self_attn"}
    assert type(model.lm_head) is torch.nn.Linear


def test_rules_choose_formats_per_module(llama: Path):
    rules = [("*down_proj", "int8"), ("model.layers.1.*", "bf16"), ("lm_head", "int8")]
    model = load(llama, quantization_config=whit.QuantizationConfig("int4-g32", rules=rules))
    formats = {n: str(m.format) for n, m in model.named_modules() if isinstance(m, PackedModule)}
    assert formats["model.layers.0.mlp.down_proj"] == formats["lm_head"] == "int8-channel"
    assert formats["model.layers.0.mlp.up_proj"] == "int4-g32"
    assert not [name for name in formats if ".1." in name]
    assert model.config.quantization_config.formats == formats


@pytest.mark.parametrize("method", ["rtn", "clip", "hqq"])
def test_methods_without_data_run_while_loading(method: str, llama: Path):
    config = whit.QuantizationConfig("int4-g32-asym-fz", method=method)
    model = load(llama, quantization_config=config)
    wanted = fake_quantized(type(model), llama, config.recipe)
    torch.testing.assert_close(logits(model, "llama"), logits(wanted, "llama"), atol=1e-5, rtol=0)


def test_one_config_serves_many_models(llama: Path, tmp_path: Path):
    config = whit.QuantizationConfig("int8")
    before = copy.deepcopy(config.to_dict())
    load(llama, quantization_config=config)
    bert = load(save_tiny(tmp_path / "bert", "bert"), "bert", quantization_config=config)
    assert config.to_dict() == before
    assert all(name.startswith(("bert.", "cls.")) for name in bert.config.quantization_config.formats)


def test_the_checkpoints_own_config_wins(llama: Path):
    packed = packed_copy(llama)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(packed, quantization_config=whit.QuantizationConfig("int8"))
    assert str(model.model.layers[0].mlp.up_proj.format) == "int4-g32"


def test_a_fresh_head_stays_fresh(llama: Path, tmp_path: Path):
    packed = packed_copy(llama)
    for folder, options in [(llama, {"quantization_config": INT4}), (packed, {})]:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options)
        assert type(model.score) is torch.nn.Linear
        assert 0 < model.score.weight.abs().max() < 1
        assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
        model.config.pad_token_id = 0
        assert logits(model, "llama").isfinite().all()
    bert = save_tiny(tmp_path / "bert", "bert")
    config = whit.QuantizationConfig("int8", rules=[("classifier", "int8")])
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5, quantization_config=config)
    assert type(model.classifier) is torch.nn.Linear
    assert 0 < model.classifier.weight.abs().max() < 1
    assert "classifier" not in model.config.quantization_config.formats
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


def test_auto_classes_of_every_task(tmp_path: Path):
    for architecture, auto in [
        ("llama", AutoModelForCausalLM), ("llama", AutoModel), ("bert", AutoModelForMaskedLM), ("bert", AutoModel),
        ("t5", AutoModelForSeq2SeqLM), ("gpt2", AutoModel),
    ]:  # fmt: skip
        original = save_tiny(tmp_path / architecture, architecture)
        packed = packed_copy(original, INT4, architecture)
        fly, again = auto.from_pretrained(original, quantization_config=INT4), auto.from_pretrained(packed)
        assert torch.equal(logits(fly, architecture), logits(again, architecture))
        assert any(isinstance(m, PackedModule) for m in again.modules())
        assert type(fly) is type(again)


def test_a_base_model_that_was_saved_loads_under_a_head(llama: Path):
    AutoModel.from_pretrained(llama, quantization_config=INT4).save_pretrained(llama / "base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama / "base")
    wanted = AutoModel.from_pretrained(llama / "base")
    assert torch.equal(logits(model.model, "llama"), logits(wanted, "llama"))


def test_tied_embeddings_share_one_packed_matrix(tmp_path: Path):
    original = save_tiny(tmp_path / "m", "llama-tied")
    for glob in ("model.embed_tokens", "lm_head"):
        config = whit.QuantizationConfig("int4-g32", rules=[(glob, "int8")])
        model = load(original, "llama-tied", quantization_config=config)
        assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
        assert isinstance(model.lm_head, TiedHead)
        before = logits(model, "llama-tied")
        model.tie_weights()
        assert torch.equal(logits(model, "llama-tied"), before)
        model.save_pretrained(tmp_path / "out")
        names = load_file(tmp_path / "out" / "model.safetensors")
        assert sorted(n for n in names if "embed" in n or "head" in n) == [
            "model.embed_tokens.codes",
            "model.embed_tokens.scale",
        ]


def test_copies_that_differ_are_not_tied(tmp_path: Path):
    original = save_tiny(tmp_path / "m", "llama-tied")
    tensors = load_file(original / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(128, 64)
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    rules = [("model.embed_tokens", "int8"), ("lm_head", "int4-g32")]
    model = load(original, "llama-tied", quantization_config=whit.QuantizationConfig("int8", rules=rules))
    assert isinstance(model.lm_head, QuantizedLinear)
    wanted = whit.quantize_tensor(tensors["lm_head.weight"], "int4-g32").dequantize()
    assert torch.equal(model.lm_head.dequantize(), wanted)
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out", "llama-tied")
    assert torch.equal(logits(again, "llama-tied"), logits(model, "llama-tied"))


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gemma3", "qwen3_moe", "t5", "bert", "opt"])
def test_dequantize_gives_a_plain_model_back(architecture: str, tmp_path: Path):
    original = save_tiny(tmp_path / "m", architecture)
    rules = [("*embed_tokens", "int8")] if architecture in ("llama-tied", "gemma3") else []
    config = whit.QuantizationConfig(
        "int4-g32", rules=[*rules, *([("shared", "int8")] if architecture == "t5" else [])]
    )
    model = load(original, architecture, quantization_config=config)
    wanted = logits(model, architecture)
    model = model.dequantize()
    assert not any(isinstance(m, PackedModule | TiedHead) for m in model.modules())
    torch.testing.assert_close(logits(model, architecture), wanted, atol=1e-5, rtol=0)
    plain = load(original, architecture)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path / "out", architecture), architecture), wanted, atol=1e-5, rtol=0)


def test_copies_and_casts_of_a_whole_model(llama: Path, tmp_path: Path):
    model = load(llama, quantization_config=INT4)
    wanted = logits(model, "llama")
    assert torch.equal(logits(copy.deepcopy(model), "llama"), wanted)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), "llama"), wanted)
    other = load(llama, quantization_config=INT4)
    other.load_state_dict(model.state_dict())
    cast = model.to(torch.bfloat16)
    assert cast.model.layers[0].mlp.up_proj.scale.dtype == torch.bfloat16
    assert logits(cast, "llama").dtype == torch.bfloat16


def test_gradients_reach_the_embeddings(llama: Path):
    model = load(llama, quantization_config=INT4)
    plain = fake_quantized(type(model), llama, INT4.recipe)
    inputs = tiny_inputs("llama")
    for m in (model, plain):
        m(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [m.model.embed_tokens.weight.grad for m in (model, plain)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_enable()
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
