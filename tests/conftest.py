"""What all tests share: where the large shared data lies, and the marker that skips without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tiny_text import random_words, word_tokenizer, write_words
from whit.cli import main

settings.register_profile("whit", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("whit")


def shared_folder() -> Path:
    return Path(os.environ.get("WHIT_SHARED", Path.home() / ".cache" / "whit-shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    have_shared, have_gpu = (shared_folder() / "whole").exists(), torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("shared") and not have_shared:
            item.add_marker(pytest.mark.skip(reason="the shared real model and data are not unpacked here"))
        if item.get_closest_marker("gpu") and not have_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds the real 135M model and the evaluation data."""
    return shared_folder()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 words that tiny models know, to calibrate with."""
    return write_words(tmp_path_factory.mktemp("text"), random_words(6000, 3, seed=1))


@pytest.fixture
def tiny_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is quantized has the tokenizer of tiny_text.py, which is saved beside none of the tiny ones."""
    monkeypatch.setattr("whit.pipeline.job.load_tokenizer", lambda *_, **__: word_tokenizer())


@pytest.fixture
def whit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit status, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["whit", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:  # typer leaves by SystemExit even when all went well
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def random() -> torch.Generator:
    """A seeded generator, so that no test touches the global seed."""
    return torch.Generator().manual_seed(0)
