"""Models that read one text and write another: their perplexity, divergence and answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers import PreTrainedTokenizerFast as Words

from whit.evaluation.text import cut_windows, tokenize

CONTEXT = 33
BART = {
    "vocab_size": 256, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0, "decoder_start_token_id": 0, "init_std": 0.3,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 256, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "pad_token_id": 1,
    "eos_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module", params=["bart", "t5"])
def model(request: pytest.FixtureRequest, tokenizer: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / request.param
    torch.manual_seed(0)
    made = BartForConditionalGeneration(BartConfig(**BART)) if request.param == "bart" else None
    (made or T5ForConditionalGeneration(T5Config(**T5))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_labels(model: Path, tokenizer: Words, text: Path) -> float:
    """The perplexity by transformers' own loss, which makes the decoder's inputs of the labels."""
    network = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    windows = cut_windows(tokenize(text.read_text(), tokenizer, 1000, str(text)), CONTEXT)
    half, losses = CONTEXT // 2, []
    for window in windows:
        source = torch.cat([window[: half - 1], torch.tensor([network.config.eos_token_id])])
        with torch.no_grad():
            losses.append(network(input_ids=source[None], labels=window[None, half:]).loss.item())
    return math.exp(sum(losses) / len(losses))


def test_the_second_half_is_predicted_from_the_first(whit, model: Path, tokenizer: Words, text_file: Path):
    words = ("evaluate", model, "--text", text_file, "--max-tokens", 1000, "--context", CONTEXT, "--json")
    status, out, err = whit(*words)
    assert status == 0, err
    found = json.loads(out)
    assert found["perplexity"] == pytest.approx(by_labels(model, tokenizer, text_file), rel=1e-4)
    assert found["tokens"] == 1000 // CONTEXT * (CONTEXT - CONTEXT // 2)
    assert "the second half of every window is predicted, from the first" in err


def test_calibrated_compared_and_asked(whit, model: Path, text_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    status, _, err = whit(
        "quantize", model, out, "--method", "gptq", "--format", "int4-g32", "--calibration", text_file,
        "--samples", 4, "--context", 32,
    )  # fmt: skip
    assert status == 0, err
    words = ("evaluate", out, "--baseline", model, "--text", text_file, "--max-tokens", 1000, "--context", 64, "--json")
    status, live, err = whit(*words)
    assert status == 0, err
    assert 0 < json.loads(live)["kl"]["mean"] < 1
    status, stored, err = whit(*words, "--two-pass")
    assert status == 0, err
    assert json.loads(stored)["kl"]["mean"] == pytest.approx(json.loads(live)["kl"]["mean"], rel=1e-5)
    status, said, err = whit("generate", out, "-p", "the text", "-n", 6, "--greedy", "--json", "--no-compile")
    assert status == 0, err
    assert 1 <= json.loads(said)["new_tokens"] <= 6


def test_budgets_by_the_hessian(whit, model: Path, text_file: Path, tmp_path: Path):
    pytest.importorskip("scipy")
    words = ("quantize", model, tmp_path / "out", "--target-bpw", "9", "--ladder", "int4-g32,int8", "--calibration")
    status, _, err = whit(*words, text_file, "--samples", 4, "--context", 32, "--sensitivity", "hessian")
    assert status == 0, err
    status, _, err = whit(*words, text_file, "--samples", 4, "--context", 32)
    assert status == 1
    assert "use --sensitivity hessian" in err


def test_what_knows_models_of_one_text_alone_says_so(
    whit, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("whit.evaluation.measure._plan_tasks", lambda options: ([], [*options.tasks]))
    for words, said in (
        (("evaluate", model, "--tasks", "piqa"), "tasks compare continuations of one; leave --tasks out"),
        (("generate", model, "-p", "x", "--kv-cache", "int8"), "keeps keys and values of one text"),
        (("generate", model, "-p", "x" * 70), "70 tokens and 50 new ones exceed" if "bart" in model.name else ""),
        (("compare", model, tmp_path / "cmp"), "is not a causal language model"),
    ):
        status, out, err = whit(*words)
        if said:
            assert (status, out) == (1, ""), err
            assert said in err
    assert not (tmp_path / "cmp").exists()
