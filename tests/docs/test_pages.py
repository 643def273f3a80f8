"""The tutorial's pages run, and print what they show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import execute


@pytest.mark.parametrize("name", sorted(path.name for path in execute.PAGES.glob("*.md")))
def test_a_page_prints_what_it_shows(name: str):
    page = (execute.PAGES / name).read_text()
    assert "```text" in page
    _, differences = execute.run_page(page)
    assert not differences


def test_a_wrong_output_is_found():
    page = "```python\nprint('a', 100, 0.5)\n```\n\n```text\na {} 0.5\n```\n"
    assert execute.run_page(page.format(101))[1] == []  # within the tolerance
    assert execute.run_page(page.format(110))[1]
    assert execute.run_page(page.replace("a {}", "b 100"))[1]
    fixed, differences = execute.run_page(page.format(7))
    assert differences
    assert execute.run_page(fixed)[1] == []
