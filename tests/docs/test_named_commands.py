"""Every figure in README and docs has a command beside it, and the commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"`(?:python (?:benchmarks|docs)/|make |whit )|^\s*(?:make|python|whit) ", re.MULTILINE)
MEASURED = re.compile(
    r"\d (?:times as|% (?:more|less|faster|slower|of)|tokens per second|GB/s|s and)|\]\([^)]*results/"
)


def sections(text: str) -> list[str]:
    """The page cut at its headings; code and what it prints stay within."""
    return re.split(r"^#+ ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_targets_that_are_named_exist(page: Path):
    text = page.read_text()
    for script in re.findall(r"python ((?:benchmarks|docs)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"[`\n]make ([\w-]+)", text):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_measured_figures_have_a_command_beside_them(page: Path):
    for section in sections(page.read_text()):
        if MEASURED.search(section):
            assert COMMAND.search(section) or "```python" in section or "```bash" in section, section[:200]


def test_paragraphs_that_point_to_results_name_the_script():
    for page in PAGES:
        for paragraph in page.read_text().split("\n\n"):
            if "benchmarks/results/" in paragraph:
                assert re.search(r"`(?:python )?[\w/]+\.py", paragraph), f"{page.name}: {paragraph[:200]}"
