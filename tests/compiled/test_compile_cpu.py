"""Compiled decoding on the processor: the tokens of transformers' own loop, by every instruction set and setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decoding_helpers import GREEDY, prompt, same
from transformers import AutoModelForCausalLM, DynamicCache, MaxLengthCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

import whit
from whit.compiled import loop
from whit.compiled.llama import Compiled
from whit.compiled.loop import States
from whit.kernels.cpu import library

from tiny_models import save_tiny, tiny_model

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")
LLAMAS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", LLAMAS)
def test_the_tokens_are_those_of_the_model(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    prompts = [prompt(length, length) for length in (1, 2, 17)]
    expected = [model.generate(ids, **GREEDY) for ids in prompts]
    assert whit.compile(model, strict=True) is model
    for ids, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(ids, **GREEDY), tokens)


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [("int4-g32", ""), ("int3-g16-asym", ""), ("nf4-dq", ""), ("int8", ""), ("q4_0", ""), ("q5_1", ""), ("ternary", ""),
     ("int4-g32", "int8-g32"), ("int4-g64-asym", "int8-g32"), ("int8", "int8"), ("q8_0", "int8-g32"),
     ("nf4", "int8-g32"), ("nf4-dq", "int8-g32"), ("fp4-g32", "int8-g32")],
)  # fmt: skip
def test_packed_weights_and_quantized_inputs(tmp_path: Path, spec, inputs):
    folder = save_tiny(tmp_path / "model", "llama-tied", torch.bfloat16)
    recipe = whit.Recipe(rules=[("*", spec)], activations=inputs or None)
    config = whit.QuantizationConfig(recipe)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    expected = model.generate(prompt(), **GREEDY)
    assert torch.equal(whit.compile(model, strict=True).generate(prompt(), **GREEDY), expected)


def logits_of_a_step(model, compiled_library, length):
    """The logits after `length` tokens in the cache, from the model and from the decoder."""
    tokens = prompt(length + 1)

    def filled():
        cache = DynamicCache(config=model.config)
        model(tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    with torch.no_grad():
        expected = model(tokens[:, -1:], past_key_values=filled(), use_cache=True).logits[0, -1]
        states = States(Compiled(model, compiled_library), filled(), length + 1)
        states.begin()
    states.decode(int(tokens[0, -1]), 1, [])
    return expected, states.decoder.logits


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_gives_the_models_logits(isa):
    compiled = library()
    if isa not in compiled.isas:
        pytest.skip(f"this processor does not run {isa}")
    only = replace(compiled, isas=(isa,), isas8=("scalar",))
    for architecture, length in (("qwen3", 30), ("llama", 600)):  # beyond 512 attention goes on in a second part
        expected, found = logits_of_a_step(tiny_model(architecture), only, length)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["int4-g32", "int3-g32-asym", "int2-g16"])
def test_inputs_as_bytes_give_the_models_logits(tmp_path: Path, spec):
    """As processors with AMX decode few bits; any with VNNI runs it."""
    compiled = library()
    if "avx512_vnni" not in compiled.isas8:
        pytest.skip("bytes are multiplied by AVX-512 VNNI")
    folder = save_tiny(tmp_path / "model", "llama-tied", torch.bfloat16)
    config = whit.QuantizationConfig(whit.Recipe(rules=[("*", spec)]))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    expected, found = logits_of_a_step(model, replace(compiled, isas=(*compiled.isas[:4], "amx")), 30)
    plain = logits_of_a_step(model, compiled, 30)[1]
    assert (found.float() - expected.float()).norm() < 0.01 * expected.float().norm()
    assert (found.float() - plain.float()).norm() < 0.01 * plain.float().norm()


def test_a_mask_of_ones_masks_nothing(llama):
    """Some versions of transformers hand it to the loop."""
    same(llama, prompt(), attention_mask=torch.ones(1, 9, dtype=torch.long), **GREEDY)
    kept = {"past_key_values": DynamicCache(config=llama.config), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    stop = StoppingCriteriaList([MaxLengthCriteria(30)])
    config = llama._prepare_generation_config(None, do_sample=False)[0]
    assert loop._require_covered(prompt(), stop, config, kept) == 0


def test_a_team_of_any_size_gives_the_same_bits():
    model, threads = tiny_model("qwen2"), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(logits_of_a_step(model, library(), 40)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_sampling_draws_what_transformers_would_draw(llama):
    drawing = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = llama.plain(prompt(), **drawing)
        torch.manual_seed(3)
        assert torch.equal(llama.generate(prompt(), **drawing), expected)


def test_processors_criteria_and_stop_tokens(llama):
    same(llama, prompt(), repetition_penalty=1.7, no_repeat_ngram_size=2, **GREEDY)
    tokens = llama.plain(prompt(), **GREEDY)[0, 9:].tolist()
    _, found = same(llama, prompt(), eos_token_id=[tokens[7], 127], pad_token_id=0, **GREEDY)
    assert found.shape[1] == 9 + tokens.index(tokens[7]) + 1
    same(llama, prompt(), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(14)]), **GREEDY)
    same(llama, prompt(), max_new_tokens=1, do_sample=False)


def test_scores_logits_and_the_cache_come_back(llama):
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = same(llama, prompt(), repetition_penalty=1.2, **asked, **GREEDY)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)
    more = torch.cat([found.sequences, prompt(4)], dim=1)
    continued = llama.generate(more, past_key_values=found.past_key_values, **GREEDY)
    assert torch.equal(continued, llama.plain(more, **GREEDY))


def test_the_cache_grows(llama, monkeypatch):
    monkeypatch.setattr("whit.compiled.loop.ROOM", 3)
    same(llama, prompt(), max_new_tokens=90, do_sample=False, eos_token_id=None)


def test_the_prompt_lies_where_the_decoder_reads_it_and_nowhere_else(llama, monkeypatch):
    shared = []

    class Watched(States):
        def begin(self) -> None:
            super().begin()
            pairs = zip(self.cache.layers, self.tensor, strict=True)
            shared.extend(
                layer.keys.data_ptr() == keys.data_ptr() and layer.values.data_ptr() == values.data_ptr()
                for layer, (keys, values) in pairs
            )

    monkeypatch.setattr("whit.compiled.loop.States", Watched)
    same(llama, prompt(), **GREEDY)
    assert len(shared) == llama.config.num_hidden_layers
    assert all(shared)
    bare = llama.generate(prompt(), past_key_values=DynamicCache(), **GREEDY)  # it makes its layers as they come
    assert torch.equal(bare, llama.plain(prompt(), **GREEDY))


def test_a_cache_whose_call_was_broken_off_still_serves_transformers(llama):
    cache = DynamicCache(config=llama.config)
    llama(prompt(), past_key_values=cache, use_cache=True)
    States(Compiled(llama, library()), cache, 12)
    longer = torch.cat([prompt(), prompt(8, 1)], dim=1)
    expected = llama(longer, use_cache=False).logits[:, -1]
    found = llama(longer[:, 9:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamers_hear_every_token_as_it_comes(llama):
    ours, theirs = Heard(), Heard()
    llama.generate(prompt(), streamer=ours, **GREEDY)
    llama.plain(prompt(), streamer=theirs, **GREEDY)
    assert ours.tokens == theirs.tokens
    assert ours.ended
    assert issubclass(TextStreamer, BaseStreamer)


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_model_in_float32_writes_the_same_text(shared: Path):
    folder = shared / "models" / "smollm2-135m-fp"
    config = whit.QuantizationConfig("int4-g32")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    whit.compile(model, strict=True)
    model.plain = model.generate.uncompiled
    for start in (504, 28120):
        same(model, torch.tensor([[start, 253, 3575, 282]]), max_new_tokens=64, do_sample=False, eos_token_id=None)


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_model_in_bfloat16_finds_the_same_likeliest_tokens(shared: Path):
    """All but ties: MKL sums float32 in an order of its own, and now and then a rounding falls the other way."""
    folder = shared / "models" / "smollm2-135m-fp"
    config = whit.QuantizationConfig("int4-g32")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    agreed, steps = 0, 20
    for length in range(4, 4 + steps):
        expected, found = logits_of_a_step(model, library(), length)
        agreed += bool(expected.argmax() == found.argmax())
        assert (expected.float() - found.float()).abs().max() < 1
    assert agreed >= steps * 9 // 10
