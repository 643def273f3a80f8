"""Tokenizers in GGUF files: llama.cpp cuts a text as the model's own tokenizer does. Trained here on whit's text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy

import whit
from whit.data import resolve_text
from whit.pipeline import dequantize, run
from whit.pipeline.job import Options, prepare

from llama_cpp import LlamaCpp, needs_llama_cpp
from tiny_models import ARCHITECTURES

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)  # of Llama 3
SIZE = 1200


def lines() -> list[str]:
    return resolve_text("whit:text").read_text(encoding="utf-8")[:200_000].splitlines()


def byte_level() -> Tokenizer:
    """As Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(GPT4), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(lines(), trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: byte tokens are tokens of the model, and a token can be merged from any two that spell it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 256, special_tokens=SPECIAL, show_progress=False, limit_alphabet=80)
    tokenizer.train_from_iterator(lines(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    words = sorted((word for word in learned if word not in SPECIAL), key=learned.__getitem__)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *BYTES, *words])}
    pairs = [
        (vocabulary[word], (word[:cut], word[cut:]))
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in learned and word[cut:] in learned
    ]
    merges = [pair for _, pair in sorted(pairs, key=lambda pair: pair[0])]
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.add_special_tokens(SPECIAL)
    return found


def unigram() -> Tokenizer:
    """As T5's."""
    tokenizer = Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(" {2,}"), "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(left=False, right=True), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    tokenizer.train_from_iterator(lines()[:400], trainer)
    return tokenizer


TEXTS = [
    "The history of the town begins in 1842, when it was founded by settlers.",
    "  two spaces,\n\na new line and a\ttab; don't SHOUT at Zoë's café (naïvely) …",
    "1234567 8.90% $5 – #tags @home a_b C++ x=y*2",
]


@needs_llama_cpp()
@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, unigram], ids=lambda make: make.__name__)
def test_llama_cpp_cuts_texts_alike(make, tmp_path: Path):
    tokenizer = make()
    config = hf.LlamaConfig(
        vocab_size=SIZE + 8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path / "model"
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    run(prepare(folder, tmp_path / "m.gguf", None, Options(), export="gguf"))
    theirs = LlamaCpp(tmp_path / "m.gguf")
    for text in [*TEXTS, *filter(None, lines()[:60])]:
        found, wanted = theirs.tokens(text), tokenizer.encode(text, add_special_tokens=False).ids
        assert [*map(tokenizer.id_to_token, found)] == [*map(tokenizer.id_to_token, wanted)], text
    theirs.close()


@needs_llama_cpp()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_perplexity_is_llama_cpps_for_three_architectures(name: str, tmp_path: Path):
    """20 kB of text, cut by llama.cpp, under random quantized models: within 0.5 % of the dequantized weights'."""
    tokenizer, folder = byte_level(), tmp_path / "model"
    model_class, config_class, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    random = model_class(config_class(**{**options, "vocab_size": SIZE}))
    for parameter in random.parameters():
        parameter.data *= 6 if parameter.dim() > 1 else 1  # else every token would be as likely as any other
    random.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    whit.quantize(folder, tmp_path / "m.gguf", whit.Recipe(rules=[("*", "q5_0")]), export="gguf")
    dequantize(tmp_path / "m.gguf", tmp_path / "dense")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    theirs = LlamaCpp(tmp_path / "m.gguf")
    tokens = torch.tensor(theirs.tokens("\n".join(lines())[:20_000]))
    lost = torch.zeros(2, dtype=torch.float64)
    for window in tokens.split(64)[:-1]:
        with torch.no_grad():
            both = model(window[None]).logits[0], theirs.logits(window)
        lost += torch.tensor([float(cross_entropy(logits[:-1], window[1:], reduction="sum")) for logits in both])
    theirs.close()
    assert lost[0] / len(tokens) > 1.03 * math.log(SIZE)  # not what guessing gives
    assert abs(float(((lost[1] - lost[0]) / len(tokens)).exp()) - 1) < 0.005
