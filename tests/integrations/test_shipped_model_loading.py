"""The shipped model through transformers: quantized on load, saved in shards, reloaded, asked to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import whit
from whit.data import resolve_model


@pytest.mark.parametrize(
    ("format", "options", "least_agreement"),
    [
        ("int8", {}, 0.95),
        ("nf4", {"double_quant": True, "compute_dtype": torch.bfloat16}, 0.75),
        ("int4-g64", {"method": "hqq", "rules": [("*embed_tokens", "int8")]}, 0.7),
    ],
)
def test_quantized_on_load(format: str, options: dict, least_agreement: float, tmp_path: Path):
    folder = str(resolve_model("whit:model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    config = whit.QuantizationConfig(format, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="auto")
    assert model.get_memory_footprint() < plain.get_memory_footprint()
    text = "It was a dark evening, and the old man walked slowly towards the house, where his daughter waited for him."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        got, wanted = model(tokens).logits, plain(tokens).logits
    assert (got.argmax(-1) == wanted.argmax(-1)).float().mean() >= least_agreement
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, got)
    written = again.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(written, model.generate(tokens, max_new_tokens=8, do_sample=False))
