"""A tiny model, plain and quantized, an adapter of it, and a text; none of the tests writes into these folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import adapter

import whit
from tiny_text import random_words, word_tokenizer, write_words

from tiny_models import save_tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> whit.Calibration:
    path = write_words(tmp_path_factory.mktemp("text"), random_words(3000, 1, seed=7))
    return whit.Calibration(path, samples=8, context=48)


@pytest.fixture(autouse=True)
def _tiny_tokenizers(tiny_tokenizers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whit.merging.measure.load_tokenizer", lambda *_, **__: word_tokenizer())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("plain"), "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("packed") / "int4"
    whit.quantize(plain, out, whit.Recipe("rtn", [("*", "int4-g32")]))
    return out


@pytest.fixture(scope="module")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(packed, tmp_path_factory.mktemp("adapter"))
