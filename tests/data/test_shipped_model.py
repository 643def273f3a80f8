"""The shipped model and texts are what their card says, and plain transformers loads them."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import whit

DATA = Path(whit.__file__).parent / "data"
MODEL, TEXT = DATA / "model", DATA / "text"
CONTEXT = 2048


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((MODEL / "training.json").read_text())


@pytest.fixture(scope="module")
def heldout() -> str:
    return (TEXT / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def calibration() -> str:
    return (TEXT / "calibration.txt").read_text(encoding="utf-8")


def test_the_shipped_model_has_the_shape_that_it_is_said_to_have(model, record):
    config = model.config
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("llama", 8192, 256)
    assert (config.intermediate_size, config.num_hidden_layers) == (768, 8)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == record["parameters"] == 8_130_816


def test_every_linear_suits_superblocks_of_256(model):
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 8 * 7 + 1
    assert all(linear.in_features % 256 == 0 for linear in linears)


def test_weights_are_bfloat16_and_small():
    assert (MODEL / "model.safetensors").stat().st_size <= 20_000_000
    assert AutoModelForCausalLM.from_pretrained(MODEL).dtype == torch.bfloat16


def test_weights_lie_on_no_grid(model):
    weight = model.model.layers[3].mlp.up_proj.weight
    assert weight.isfinite().all()
    assert len(weight[0].unique()) > 200


@torch.no_grad()
def bits_per_byte(model, tokenizer, text: str, token_count: int) -> float:
    ids = tokenizer(text, add_special_tokens=False).input_ids[:token_count]
    stream = torch.tensor([tokenizer.eos_token_id, *ids])
    nats = 0.0
    for start in range(0, token_count, CONTEXT):
        window = stream[start : start + CONTEXT + 1]
        logits = model(window[None, :-1]).logits[0]
        nats += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return nats / math.log(2) / len(tokenizer.decode(ids).encode())


def test_heldout_slice_scores_as_recorded_and_below_the_5_gram(model, tokenizer, record, heldout):
    recorded = record["heldout_slice"]
    measured = bits_per_byte(model, tokenizer, heldout, recorded["tokens"])
    assert measured == pytest.approx(recorded["bits_per_byte"]["model"], rel=0.005)
    assert measured < 0.85 * recorded["bits_per_byte"]["kneser_ney"]


@pytest.mark.parametrize("text", ["wiki_valid", "heldout"])
def test_the_record_is_below_the_5_gram(record, text):
    assert record["scores"][text]["bits_per_byte"] < record["kneser_ney"]["scores"][text]["bits_per_byte"]
    assert record["epochs"] >= 3


def test_the_curve_falls_to_its_last_row(record):
    curve = record["curve"]
    assert curve[-1]["step"] == record["steps"]
    assert min(row["wiki_valid"] for row in curve) == curve[-1]["wiki_valid"]


def test_texts_survive_the_tokenizer(tokenizer, heldout, calibration):
    for text in (heldout, calibration[:200_000], "tab\there,\r\n  naïve \U0001f41a \x00 end  "):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < 8192


def test_no_special_token_is_added(tokenizer):
    assert tokenizer.decode(tokenizer("Once").input_ids) == "Once"
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id == tokenizer.bos_token_id == 0


def test_greedy_generation_is_text(model, tokenizer):
    prompt = tokenizer("The old man looked at her and said", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    words = tokenizer.decode(ids[0, prompt.input_ids.shape[1] :]).split()
    assert len(words) >= 10
    assert sum(word.strip('.,;:!?"').isalpha() for word in words) >= 0.7 * len(words)


def test_texts_have_their_sizes(heldout, calibration):
    assert 150_000 <= len(heldout.encode()) <= 250_000
    assert 900_000 <= len(calibration.encode()) <= 1_100_000


def test_texts_share_no_passage(heldout, calibration):
    length = 60
    shingles = {heldout[start : start + length] for start in range(len(heldout) - length)}
    starts = range(len(calibration) - length)
    shared = [calibration[i : i + length] for i in starts if calibration[i : i + length] in shingles]
    assert [passage for passage in shared if passage.strip()] == []
