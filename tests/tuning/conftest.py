"""The model and the texts of the short fine-tunings; none of the tests writes there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_models import save_speaking


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ("late", "early", "cold", "warm", "dark", "bright")
    lines = [{"prompt": f"How was day {i}?\n", "response": f"It was {words[i % 6]}. " * (1 + i % 4)} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
