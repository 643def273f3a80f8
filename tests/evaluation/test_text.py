"""Reading the text that is scored."""

from __future__ import annotations

from pathlib import Path

from whit.evaluation.text import read_text


def test_line_ends_do_not_change_the_text(tmp_path: Path):
    (tmp_path / "lf.txt").write_bytes(b"one\ntwo\n\nthree\n")
    (tmp_path / "crlf.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert read_text(tmp_path / "crlf.txt") == read_text(tmp_path / "lf.txt")
