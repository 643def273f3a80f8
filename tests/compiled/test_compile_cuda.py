"""`compile_cuda` where there is no GPU: the same loop with calls in place of CUDA graphs, against transformers'."""

from __future__ import annotations

import pytest
import torch
import transformers

from whit.compiled.cuda import compile_cuda
from whit.errors import UnsupportedModelError

from tiny_models import tiny_model


def both(model, **kwargs):
    """Tokens by transformers and through the compiled loop."""
    torch.manual_seed(3)
    wanted = type(model).generate(model, **kwargs)
    torch.manual_seed(3)
    return wanted, compile_cuda(model, {}, capture=lambda work: work).generate(**kwargs)


def prompt(rows=1, count=7):
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "mixtral", "opt"])
def test_greedy_tokens_are_those_of_transformers(architecture):
    model = tiny_model(architecture)
    wanted, found = both(model, input_ids=prompt(), max_new_tokens=20, do_sample=False)
    assert torch.equal(wanted, found)


def test_padded_batch_and_ends():
    model = tiny_model("llama")
    tokens = prompt(3, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[1, :2] = 0
    plain = model.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    stop = int(plain[1, 14])  # so that sequences end at different places
    wanted, found = both(
        model, inputs=tokens, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=[stop, 2]
    )
    assert torch.equal(wanted, found)
    assert (found[1] == 0).any()


def test_sampling_processors_and_streamers_are_transformers():
    model = tiny_model("llama")
    wanted, found = both(
        model,
        input_ids=prompt(2),
        max_new_tokens=12,
        do_sample=True,
        top_p=0.9,
        temperature=0.8,
        repetition_penalty=1.2,
    )
    assert torch.equal(wanted, found)

    class Seen(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.values, self.done = [], 0

        def put(self, value):
            self.values += value.reshape(-1).tolist()

        def end(self):
            self.done += 1

    first, second = Seen(), Seen()
    fresh = tiny_model("llama")
    fresh.generate(prompt(), max_new_tokens=5, do_sample=False, streamer=first)
    compile_cuda(fresh, {}, capture=lambda work: work).generate(
        prompt(), max_new_tokens=5, do_sample=False, streamer=second
    )
    assert (first.values, first.done) == (second.values, second.done)


def test_calls_one_after_the_other_share_a_cache_and_nothing_else():
    model = tiny_model("llama")
    plain = tiny_model("llama")
    compiled = compile_cuda(model, {"batch": 1, "length": 40}, capture=lambda work: work)
    for seed, count in ((1, 12), (2, 3), (3, 30)):
        tokens = torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))
        wanted = plain.generate(tokens, max_new_tokens=10, do_sample=False)
        assert torch.equal(wanted, compiled.generate(tokens, max_new_tokens=10, do_sample=False))


def test_what_the_loop_does_not_know_goes_to_transformers():
    model = tiny_model("llama")
    wanted, found = both(model, input_ids=prompt(), max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(wanted, found)
    embedded = model.get_input_embeddings()(prompt())
    wanted, found = both(model, inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
    assert torch.equal(wanted, found)


def test_positions_beyond_the_cache_go_to_transformers():
    model = tiny_model("llama")
    positions = torch.arange(20, 27)[None]
    wanted, found = both(model, input_ids=prompt(), position_ids=positions, max_new_tokens=8, do_sample=False)
    assert torch.equal(wanted, found)
    assert model.generate.__self__._decoder is None


def test_a_step_that_cannot_be_captured_is_launched_and_said_to_be():
    def refusing(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, plain = tiny_model("llama"), tiny_model("llama")
    compiled = compile_cuda(model, {}, capture=refusing)
    with pytest.warns(UserWarning, match="not permitted"):
        found = compiled.generate(prompt(), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, plain.generate(prompt(), max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize(("architecture", "why"), [("t5", "encoder"), ("gemma2", "StaticSlidingWindow")])
def test_models_that_cannot_be_compiled_are_refused_and_the_reason_said(architecture, why):
    with pytest.raises(UnsupportedModelError, match=why):
        compile_cuda(tiny_model(architecture), {})
