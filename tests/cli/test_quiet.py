"""Other libraries' progress bars: on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from functools import partialmethod

import pytest
from tqdm import std
from tqdm.auto import tqdm

from whit.cli import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _plain(bar: type) -> object:
    """tqdm's own, whether or not another test has been through main."""
    own = vars(bar)["__init__"]
    return own.func if isinstance(own, partialmethod) else own


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_command_line_lets_bars_appear_on_a_terminal_alone(stream, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(std.tqdm, "__init__", _plain(std.tqdm))  # put back what main changes
    monkeypatch.setattr(sys, "argv", ["whit", "--version"])
    with pytest.raises(SystemExit):
        main()
    with redirect_stderr(stream()) as said:
        assert list(tqdm(range(3), desc="Converting")) == [0, 1, 2]
    assert ("\r" in said.getvalue()) == (stream is Terminal)
