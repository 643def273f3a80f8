"""Reading the text that is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whit.errors import EvaluationError
from whit.evaluation.text import read_text


def test_line_ends_do_not_change_the_text(tmp_path: Path):
    (tmp_path / "lf.txt").write_bytes(b"one\ntwo\n\nthree\n")
    (tmp_path / "crlf.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert read_text(tmp_path / "crlf.txt") == read_text(tmp_path / "lf.txt")


def test_the_texts_of_json_lines_are_scored_and_not_the_json(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    turns = [{"role": "user", "content": "three"}]
    records = [{"text": "one\u2028two"}, {"messages": turns}]  # a line end of Unicode within a string is none of JSON's
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    assert read_text(path) == "one\u2028two\n\nthree"
    path.write_text('{"sentence": "one"}\n')
    with pytest.raises(EvaluationError, match="line 1: no text in it; it must have `text`"):
        read_text(path)
