"""Where compiled decoding ends on the processor: calls that transformers' own loop takes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from decoding_helpers import GREEDY, prompt, same

import whit
from whit.errors import UnsupportedModelError
from whit.kernels.cpu import library

from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason="the CPU kernels are not built")


@pytest.mark.parametrize(
    ("options", "why"),
    [({"num_beams": 2}, "beam_search is neither"), ({"use_cache": False}, "the cache is a"),
     ({"cache_implementation": "static"}, "not a DynamicCache"),
     ({"attention_mask": torch.tensor([[0] + [1] * 8])}, "some tokens are masked"),
     ({"inputs": prompt().expand(2, -1)}, "takes one row"),
     ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states are asked for")],
)  # fmt: skip
def test_transformers_takes_what_is_not_covered_and_a_warning_says_so(llama, options, why):
    call = {"inputs": prompt(), **GREEDY, **options}
    expected = llama.plain(**call)
    with pytest.warns(UserWarning, match=f"{why}.*transformers' own loop takes this call"):
        found = llama.generate(**call)
    assert torch.equal(getattr(expected, "sequences", expected), getattr(found, "sequences", found))


def test_a_window_that_the_text_does_not_reach_is_no_obstacle():
    model = tiny_model("mistral")
    model.config.sliding_window = 64
    expected = model.generate(prompt(), **GREEDY)
    whit.compile(model, strict=True)
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    model.config.sliding_window = 20
    with pytest.warns(UserWarning, match="attention slides over 20 tokens"):
        assert torch.equal(model.generate(prompt(), **GREEDY), model.generate.uncompiled(prompt(), **GREEDY))


def test_a_model_that_changed_is_read_again(llama):
    other = tiny_model("llama", seed=1)
    llama.load_state_dict(other.state_dict())
    same(llama, prompt(), **GREEDY)
    llama.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    same(llama, prompt(), **GREEDY)
    llama.bfloat16()
    same(llama, prompt(), **GREEDY)
    llama.model.norm.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"model\.norm has a hook"):
        llama.generate(prompt(), **GREEDY)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi3", "mixtral"])
def test_other_architectures_are_refused(architecture):
    with pytest.raises(UnsupportedModelError, match="is none of LlamaForCausalLM"):
        whit.compile(tiny_model(architecture), strict=True)


def test_a_second_compile_does_not_wrap_the_first(llama):
    assert whit.compile(llama, strict=True).generate.uncompiled == llama.plain


def test_options_are_refused(llama):
    with pytest.raises(TypeError, match="tokens mean nothing on the processor"):
        whit.compile(llama, tokens=3)
