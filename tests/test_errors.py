"""What other libraries' exceptions become within a sentence."""

from __future__ import annotations

import pytest

from whit.errors import reason_of


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("cannot open it.\nTraceback: ..."), "cannot open it"),
        (ValueError("Validation error for field 'x':\n  expected int, got str.\nmore"),
         "Validation error for field 'x': expected int, got str"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("a" * 999), "a" * 300),
    ],
)  # fmt: skip
def test_one_line_of_an_exception(error: Exception, said: str):
    assert reason_of(error) == said
