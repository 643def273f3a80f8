"""Calibration windows: seeded, hashed, from text and from conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import whit
from whit import Calibration


class Words:
    """A tokenizer of whole words, numbered as they come."""

    def __init__(self, template: bool = False) -> None:
        self.known: dict[str, int] = {}
        self.chat_template = "t" if template else None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]}

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool) -> str:
        return " ".join(f"<{turn['role']}> {turn['content']}" for turn in turns)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(1000)))
    return path


def words(path: Path, tokenizer: Words | None = None, **options: Any) -> list[list[str]]:
    tokenizer = tokenizer or Words()
    found = Calibration(path, **options).tokens(tokenizer).tokens
    names = list(tokenizer.known)
    return [[names[i] for i in row] for row in found.tolist()]


def test_windows_are_runs_of_whole_words(text: Path):
    rows = words(text, samples=50, context=20)
    for row in rows:
        first = int(row[0][1:])
        assert row == [f"w{first + i}" for i in range(20)]
    assert len({row[0] for row in rows}) > 30


def test_the_seed_chooses_the_windows_and_the_hash_tells_them(text: Path):
    def draw(seed: int) -> whit.calibration.CalibrationTokens:
        return Calibration(text, samples=4, context=20, seed=seed).tokens(Words())

    state = torch.get_rng_state()
    assert draw(0).sha256 == draw(0).sha256 != draw(1).sha256
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(3).to_json() == {"sha256": draw(3).sha256, "samples": 4, "context": 20, "tokens": 80}


def test_a_text_of_just_one_window_will_do(text: Path):
    text.write_text("one two three four")
    assert Calibration(text, samples=1, context=4).tokens(Words()).tokens.shape == (1, 4)
    with pytest.raises(whit.WhitError, match="4 tokens; a sample has 5"):
        Calibration(text, samples=1, context=5).tokens(Words())


def test_json_lines_are_texts_or_conversations(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    records = [{"text": "a b"}, {"prompt": "c", "response": "d"}, {"messages": turns}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    whole = ["a", "b", "<user>", "c", "<assistant>", "d", "<user>", "hello", "<assistant>", "world"]
    (row,) = words(path, Words(template=True), samples=1, context=5, seed=0)
    assert "".join(row) in "".join(whole)
    plain = Words()
    words(path, plain, samples=9, context=5)
    assert set(plain.known) >= {"c", "d", "hello"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": 1}', "line 1: no text in it"),
        (b'{"text": "a"}\nnot json', "line 2: not JSON"),
        (b'{"messages": [{"role": "user"}]}', "line 1: not a conversation"),
        (b"[1]", "no text in it"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b" \n ", "the text is empty"),
    ],
)
def test_records_that_cannot_be_used_are_named(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(whit.WhitError, match=message):
        Calibration(path, samples=1, context=2).tokens(Words())


def test_wrong_requests_are_named(text: Path, tmp_path: Path):
    with pytest.raises(whit.WhitError, match="no such file"):
        Calibration(tmp_path / "absent.txt").tokens(Words())
    with pytest.raises(whit.WhitError, match="use --context 64"):
        Calibration(text, context=65).tokens(Words(), max_context=64)
    assert Calibration(text, samples=1).tokens(Words(), max_context=64).tokens.shape == (1, 64)
    for wrong in ({"samples": 0}, {"context": 1}):
        with pytest.raises(whit.WhitError, match="ask for more"):
            Calibration(text, **wrong)


def test_the_shipped_text_serves(random: torch.Generator):
    assert Calibration(samples=2, context=32).tokens(Words()).tokens.shape == (2, 32)


def test_an_encoders_windows_are_framed(text: Path):
    tokenizer = Words()
    tokenizer.cls_token_id, tokenizer.sep_token_id = 5000, 6000  # type: ignore[attr-defined]
    rows = Calibration(text, samples=8, context=20).tokens(tokenizer).tokens
    assert rows.shape == (8, 20)
    assert bool((rows[:, 0] == 5000).all())
    assert bool((rows[:, -1] == 6000).all())
    assert bool((rows[:, 1:-1] < 5000).all())
