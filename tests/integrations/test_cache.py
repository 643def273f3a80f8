"""The quantized cache against a model that is given the whole text and rounds keys and values by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

import whit
from whit.cli import build_app
from whit.errors import FormatError, RecipeError, UnsupportedModelError
from whit.memory.cache import cache_bytes, cache_layers

from tiny_models import tiny_config, tiny_inputs, tiny_model

CAUSAL = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "gemma3", "qwen3_moe"]


def steps(model, tokens: Tensor, cache, first: int = 6) -> Tensor:
    """Logits of a prompt of `first` tokens and then of one token after the other."""
    found = []
    with torch.no_grad():
        for part in (tokens[:, :first], *tokens[:, first:].split(1, dim=1)):
            found.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


def sliding(window: int):
    config = tiny_config("mistral")
    config.sliding_window = window
    torch.manual_seed(0)
    return type(tiny_model("mistral"))(config).eval()


class RoundedByHand(DynamicCache):
    """transformers' own cache; what it hands out is rounded, but for the new tokens and the last `recent` before."""

    def __init__(self, config, format: str, recent: int = 0) -> None:
        super().__init__(config=config)
        self.format, self.recent = format, recent

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        found, fresh = super().update(key_states, value_states, layer_idx, *args, **kwargs), key_states.shape[2]
        rounded = []
        for states in found:
            old = max(states.shape[2] - fresh - self.recent, 0)
            if old:
                near = whit.quantize_tensor(states[:, :, :old].contiguous(), self.format).dequantize()
                states = torch.cat([near, states[:, :, old:]], dim=2)
            rounded.append(states)
        return tuple(rounded)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize(("format", "recent"), [("int8", 0), ("int4-g8-asym", 3)])
def test_every_architecture_is_as_by_hand(architecture: str, format: str, recent: int):
    model, tokens = tiny_model(architecture), tiny_inputs(architecture)["input_ids"]
    found = steps(model, tokens, whit.QuantizedCache(model.config, format, recent))
    expected = steps(model, tokens, RoundedByHand(model.config, format, recent))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    exact = steps(model, tokens, DynamicCache(config=model.config))
    assert not torch.equal(found, exact)
    assert (found - exact).norm() < (0.02 if format == "int8" else 0.3) * exact.norm()


@pytest.mark.parametrize("recent", [0, 2, 9])
@pytest.mark.parametrize("first", [3, 10])
def test_sliding_windows(recent: int, first: int):
    model, tokens = sliding(5), tiny_inputs("llama")["input_ids"]
    cache = whit.QuantizedCache(model.config, "int8", recent)
    found = steps(model, tokens, cache, first)
    torch.testing.assert_close(found, steps(model, tokens, RoundedByHand(model.config, "int8", recent), first))
    layer = cache.layers[0]
    assert len(layer.packed[0]) + layer.keys.shape[2] == 4
    assert (layer.get_seq_length(), layer.keys.shape[2]) == (12, min(recent, 4))


def test_generate_is_stepping_and_beams_are_kept_apart():
    model, tokens = tiny_model("llama"), tiny_inputs("llama")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    caches = [whit.QuantizedCache(model.config, "int8"), RoundedByHand(model.config, "int8")]
    greedy = [model.generate(tokens, past_key_values=cache, **options) for cache in caches]
    assert torch.equal(*greedy)
    caches = [whit.QuantizedCache(model.config, "int8", 2), RoundedByHand(model.config, "int8", 2)]
    beams = [model.generate(tokens, past_key_values=cache, num_beams=3, **options) for cache in caches]
    assert torch.equal(*beams)


def test_padding_and_what_is_taken_back():
    model, tokens = tiny_model("llama"), tiny_inputs("llama")["input_ids"]
    cache = whit.QuantizedCache(model.config, "int8", 2)
    steps(model, tokens, cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 7
    again = steps(model, tokens[:, 7:], cache, 1)
    whole = steps(model, tokens, whit.QuantizedCache(model.config, "int8", 2), 7)
    torch.testing.assert_close(again[:, -1], whole[:, -1], rtol=0.02, atol=0.02)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[:, 0] = 0
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    left = model.generate(padded, attention_mask=mask, past_key_values=whit.QuantizedCache(model.config), **options)
    plain = model.generate(tokens, past_key_values=whit.QuantizedCache(model.config), **options)
    assert torch.equal(left[:, 1:], plain)


@pytest.mark.parametrize("format", ["int8", "int4-g16", "int4-g8-asym", "nf4-g16"])
def test_it_takes_the_memory_that_is_planned(format: str):
    model, tokens = tiny_model("qwen3"), tiny_inputs("qwen3")["input_ids"]
    cache = whit.QuantizedCache(model.config, format)
    steps(model, tokens, cache)
    layers, _ = cache_layers(model.config)
    assert cache.nbytes == cache_bytes(layers, 12, 2, format, torch.float32)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)


def test_what_cannot_be_is_refused():
    model, tokens = tiny_model("llama"), tiny_inputs("llama")["input_ids"]
    for format, said in (("int4-g64", "16 columns"), ("nf4-g16-dq", "shared by tokens"), ("int8-tensor", "shared")):
        with pytest.raises(RecipeError, match=said):
            steps(model, tokens, whit.QuantizedCache(model.config, format))
    with pytest.raises(FormatError, match="quantizes nothing"):
        whit.QuantizedCache(model.config, "bf16")
    with pytest.raises(RecipeError, match=r"cache: config: is of type str; it must be the model's"):
        whit.QuantizedCache("int8")
    with pytest.raises(RecipeError, match="recent tokens"):
        whit.QuantizedCache(model.config, "int8", -1)
    cache = whit.QuantizedCache(sliding(5).config)
    with pytest.raises(UnsupportedModelError, match="take tokens back"):
        cache.layers[0].crop(-1)


def test_the_command_line_takes_a_format():
    def generated(*cache: str) -> str:
        arguments = ["generate", "whit:model", "--prompt", "The river", "--max-new-tokens", "6", "--greedy", "--json"]
        done = CliRunner().invoke(build_app(), [*arguments, *cache])
        assert done.exit_code == 0, done.output
        return str(json.loads(done.stdout)["text"])

    assert generated() == generated("--kv-cache", "int8", "--kv-recent", "2") != generated("--kv-cache", "int1-g16")
