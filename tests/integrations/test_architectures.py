"""Every architecture: quantize while loading, run, save, load plainly, run again, generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loading_helpers import fake_quantized, logits, rules_for

import whit
from whit.modules import PackedModule, QuantizedEmbedding, QuantizedExperts

from tiny_models import ARCHITECTURES, save_tiny, tiny_inputs

FORMATS = ("int8", "int4-g32", "int4-g32-asym", "nf4-g32-dq", "fp8", "int3-g32")
ALL = "everything: embeddings and heads too"
PLAIN = "linears"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("what", [PLAIN, ALL])
def test_what_is_saved_and_loaded_gives_the_same_logits(architecture: str, what: str, tmp_path: Path):
    model_class = ARCHITECTURES[architecture][0]
    original = save_tiny(tmp_path / "original", architecture)
    format = FORMATS[list(ARCHITECTURES).index(architecture) % len(FORMATS)]
    recipe = whit.Recipe("rtn", rules_for(architecture, format, what == ALL))
    model = model_class.from_pretrained(original, quantization_config=whit.QuantizationConfig(recipe))
    assert any(isinstance(m, PackedModule) for m in model.modules())
    if what == ALL:
        assert any(isinstance(m, QuantizedEmbedding) for m in model.modules())
    got = logits(model, architecture)
    torch.testing.assert_close(
        got, logits(fake_quantized(model_class, original, recipe), architecture), atol=1e-5, rtol=0
    )

    model.save_pretrained(tmp_path / "quantized", max_shard_size="30KB")
    again = model_class.from_pretrained(tmp_path / "quantized")
    assert again.hf_quantizer.quantization_config.formats == model.hf_quantizer.quantization_config.formats
    assert torch.equal(logits(again, architecture), got)
    if again.can_generate():
        inputs = {"input_ids": tiny_inputs(architecture)["input_ids"]}
        tokens = again.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "format", [*FORMATS, "int1-g32", "int2-g16", "int5-channel", "fp4", "int4-g32-asym-fz", "int6-tensor"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_gives_the_logits_of_its_own_floats(
    architecture: str, format: str, dtype: torch.dtype, tmp_path: Path
):
    model_class = ARCHITECTURES[architecture][0]
    original = save_tiny(tmp_path / "original", architecture, dtype)
    if format == "fp4" and architecture == "qwen3_moe":
        format = "fp4-g32"
    model = model_class.from_pretrained(original, quantization_config=whit.QuantizationConfig(format))
    got = logits(model, architecture)
    assert got.dtype == dtype
    wanted = logits(fake_quantized(model_class, original, whit.Recipe("rtn", [("*", format)])), architecture)
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    else:
        assert (got.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(model_class.from_pretrained(tmp_path / "quantized"), architecture), got)


def test_experts_are_quantized_and_decoded_one_by_one(tmp_path: Path):
    save_tiny(tmp_path, "mixtral")
    model = ARCHITECTURES["mixtral"][0].from_pretrained(tmp_path, quantization_config=whit.QuantizationConfig("int8"))
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(experts, QuantizedExperts)
    assert len(experts) == 4
    assert experts[2].shape == experts.shape[1:]
    assert torch.equal(experts[torch.tensor([2, 0])], torch.stack([experts[2], experts[0]]))
    assert torch.equal(torch.bmm(torch.ones(4, 1, 256), experts)[2], torch.ones(1, 256) @ experts[2])
