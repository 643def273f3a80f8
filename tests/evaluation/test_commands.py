"""`whit evaluate` and `whit generate` as a user types them: exit status, standard output, one-sentence errors."""

from __future__ import annotations

import json
import re

import pytest
import torch

from whit.errors import EvaluationError
from whit.integrations.generation import Sampling, generate
from whit.integrations.loading import load_causal_lm, load_tokenizer

KEYS = [
    "model", "perplexity", "tokens", "context", "bits_per_weight", "size_bytes", "baseline", "kl", "top1_agreement",
    "tasks",
]  # fmt: skip


def test_json_and_nothing_else(whit, tiny, perturbed, text_file):
    words = ("evaluate", perturbed, "--text", text_file, "--max-tokens", 256, "--json")
    status, out, err = whit(*words, "--baseline", tiny)
    got = json.loads(out)
    assert status == 0
    assert list(got) == KEYS
    assert got["kl"]["ci95"][0] < got["kl"]["mean"] < got["kl"]["ci95"][1]
    assert list(got["kl"]) == ["mean", "ci95", "p99"]
    assert got["baseline"]["perplexity"] > 1
    assert "note: context 64" in err
    alone = json.loads(whit(*words)[1])
    assert list(alone) == KEYS
    assert alone["kl"] is None
    assert alone["tasks"] == {}
    assert alone["perplexity"] == got["perplexity"]


def test_plain_lines_off_the_terminal(whit, tiny, text_file):
    status, out, err = whit("evaluate", tiny, "--text", text_file, "--max-tokens", 256, "--baseline", tiny)
    assert status == 0
    assert "perplexity: " in out
    assert "top-1 agreement: 100.00 %" in out
    assert "comparison: 4/4, " in err
    assert "tokens/s" in err


def test_a_quality_gate_that_is_not_met_gives_status_3(whit, tiny, perturbed, text_file):
    words = ("evaluate", perturbed, "--baseline", tiny, "--text", text_file, "--max-tokens", 256, "--json")
    status, out, err = whit(*words, "--max-kl", "0.0001")
    assert status == 3
    measured = json.loads(out)["kl"]["mean"]
    assert f"mean KL divergence is {measured:.6g}; --max-kl allows 0.0001" in err
    assert "Traceback" not in err
    status, _, err = whit(*words, "--max-ppl-increase", "-99")
    assert status == 3
    assert "--max-ppl-increase allows -99 %" in err
    assert whit(*words, "--max-kl", "100", "--max-ppl-increase", "1e9")[0] == 0


def test_wrong_usage_gives_status_2_and_says_what_is_missing(whit, tiny):
    status, out, err = whit("evaluate", tiny, "--max-kl", "0.1")
    assert (status, out) == (2, "")
    assert "--max-kl needs --baseline" in err
    assert whit("evaluate")[0] == 2
    assert whit("generate", tiny)[0] == 2


def test_errors_are_one_sentence(whit, tiny, tmp_path):
    status, out, err = whit("evaluate", tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith(f"whit: {tmp_path}/nowhere: no such folder")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    status, _, err = whit("evaluate", tiny, "--text", tmp_path / "latin.txt")
    assert status == 1
    assert "byte 3 is not UTF-8" in err
    status, _, err = whit("evaluate", tiny, "--text", __file__, "--context", 65)
    assert status == 1
    assert "built for 64 positions; use --context 64" in err


def test_generate_gives_the_same_text_for_the_same_seed(whit, tiny, monkeypatch):
    words = ("generate", tiny, "--prompt", "The text", "--max-new-tokens", 8)
    status, out, err = whit(*words)
    assert status == 0
    assert out.startswith("The text")
    assert "tokens/s" in err
    assert whit(*words)[1] == out
    assert whit(*words, "--seed", 1)[1] != out
    got = json.loads(whit(*words, "--json")[1])
    assert "The text" + got["text"] == out.removesuffix("\n")
    assert got["new_tokens"] == 8
    monkeypatch.setattr("sys.stdin", type("Piped", (), {"read": lambda self: "The text\n"})())
    assert whit("generate", tiny, "--prompt", "-", "--max-new-tokens", 8)[1] == out


def test_generate_refuses_in_one_sentence(whit, tiny):
    for words, said in (
        (("--prompt", ""), "prompt: is empty"),
        (("--prompt", "x" * 60), "60 tokens and 50 new ones exceed the model's 64 positions"),
        (("--prompt", "x", "--temperature", 0), "temperature 0.0: must be above 0; or use --greedy"),
        (("--prompt", "x", "--top-p", 1.5), "top_p 1.5: must lie in"),
        (("--prompt", "x", "--max-new-tokens", 0), "max_new_tokens 0: too few"),
        (("--prompt", "x", "--chat"), "no chat template"),
    ):
        status, out, err = whit("generate", tiny, *words)
        assert (status, out) == (1, ""), said
        assert said in err
        assert err.count("\n") == 1


def test_weights_that_are_no_numbers_are_said(tiny):
    model, tokenizer = load_causal_lm(str(tiny)), load_tokenizer(str(tiny))
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(EvaluationError, match=f"{re.escape(str(tiny))}: a next token has no finite probability"):
        generate(model, tokenizer, "The", Sampling(4))


def test_a_seed_gives_the_same_text_and_leaves_the_callers_alone(tiny):
    model, tokenizer = load_causal_lm(str(tiny)), load_tokenizer(str(tiny))
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    texts = [generate(model, tokenizer, "The", Sampling(12, seed=seed)).text for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]
    greedy = [generate(model, tokenizer, "The", Sampling(12, seed=seed, greedy=True)).text for seed in (3, 4)]
    assert greedy[0] == greedy[1]
    ids = tokenizer("The", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert greedy[0] == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
