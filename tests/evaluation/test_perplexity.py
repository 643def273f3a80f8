"""Perplexity against a ten-line float64 reference, and the convention for windows."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import LlamaForCausalLM

from whit.errors import EvaluationError
from whit.evaluation import EvaluationOptions, evaluate
from whit.evaluation.perplexity import token_losses
from whit.evaluation.text import choose_context, cut_windows


def reference(folder, ids, context):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total, count = 0.0, 0
    for start in range(0, len(ids) - context + 1, context):
        window = torch.tensor(ids[start : start + context])
        with torch.no_grad():
            log_p = model(window[None]).logits[0].log_softmax(-1)
        total -= sum(float(log_p[t, window[t + 1]]) for t in range(context - 1))
        count += context - 1
    return math.exp(total / count), count


@pytest.mark.parametrize("context", [9, 17, 64])
def test_equals_the_reference(tiny, text_file, tokenizer, context):
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    want, count = reference(tiny, ids, context)
    got = evaluate(str(tiny), EvaluationOptions(text=str(text_file), context=context, device="cpu"))
    assert got.perplexity == pytest.approx(want, rel=1e-5)
    assert (got.tokens, got.context) == (count, context)
    assert 0 < got.perplexity_stderr < got.perplexity


def test_context_defaults_to_the_models_maximum_and_says_so(tiny, text_file):
    got = evaluate(str(tiny), EvaluationOptions(text=str(text_file), max_tokens=200))
    assert got.context == 64
    assert got.tokens == 3 * 63
    assert any("context 64" in note for note in got.notes)


def test_bits_per_weight_counts_every_byte(tiny, text_file):
    got = evaluate(str(tiny), EvaluationOptions(text=str(text_file), max_tokens=64))
    assert got.size_bytes == (tiny / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny).parameters())
    assert got.bits_per_weight == pytest.approx(8 * got.size_bytes / parameters)


def test_a_short_text_is_one_short_window():
    tokens = torch.arange(10)
    assert cut_windows(tokens, 16).tolist() == [list(range(10))]
    assert cut_windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_losses_do_not_depend_on_the_chunks(random, monkeypatch):
    logits, targets = torch.randn(50, 30, generator=random), torch.randint(30, (50,), generator=random)
    whole = token_losses(logits, targets)
    monkeypatch.setattr("whit.evaluation.perplexity._CHUNK_ELEMENTS", 100)
    assert torch.equal(token_losses(logits, targets), whole)
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert torch.allclose(whole, want, atol=1e-5)


def test_the_context_is_at_most_the_models_and_at_least_two():
    assert choose_context(None, None) == 2048
    assert choose_context(None, 4096) == 2048
    assert choose_context(None, 512) == 512
    with pytest.raises(EvaluationError, match="built for 512 positions; use --context 512"):
        choose_context(513, 512)
    with pytest.raises(EvaluationError, match="too short"):
        choose_context(1, 512)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"x", "1 tokens"), (b"caf\xe9 au lait", "byte 3 is not UTF-8")],
)
def test_texts_that_cannot_be_scored(tiny, tmp_path, content, said):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=said):
        evaluate(str(tiny), EvaluationOptions(text=str(path)))


def test_a_missing_text_is_said(tiny):
    with pytest.raises(EvaluationError, match="no such file"):
        evaluate(str(tiny), EvaluationOptions(text="nowhere.txt"))


def test_nan_weights_are_refused(tiny, text_file, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    for path in tiny.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(EvaluationError, match=f"{re.escape(str(tmp_path))}: a next token has no finite probability"):
        evaluate(str(tmp_path), EvaluationOptions(text=str(text_file), max_tokens=64))


def test_the_callers_seed_and_dtype_are_left_alone(tiny, text_file):
    torch.manual_seed(5)
    before, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    evaluate(str(tiny), EvaluationOptions(text=str(text_file), max_tokens=128, baseline=str(tiny)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() == dtype


@pytest.mark.shared
@pytest.mark.slow
def test_the_real_model_reads_wikitext_as_published(shared):
    options = EvaluationOptions(text=str(shared / "data/wikitext2/wiki.test.raw"), context=2048, max_tokens=8192)
    got = evaluate(str(shared / "models/smollm2-135m-fp"), options)
    assert got.perplexity == pytest.approx(23.26, abs=0.1)
    assert got.tokens == 4 * 2047
