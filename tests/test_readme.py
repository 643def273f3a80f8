"""Everything the README shows: its commands run, its Python runs, its figures are those of the committed results."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture(scope="module")
def commands_ran(tmp_path_factory) -> list[tuple[str, subprocess.CompletedProcess[str]]]:
    """Every command of the README, in its order, in one folder."""
    folder = tmp_path_factory.mktemp("readme")
    done = []
    for line in (line for block in blocks("bash") for line in block.splitlines()):
        command = [sys.executable, "-m", *shlex.split(line, comments=True)]
        done.append((line, subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)))
    return done


def test_the_commands_run(commands_ran):
    assert len(commands_ran) >= 9
    for line, result in commands_ran:
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        assert result.stdout.strip(), line


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_the_python_runs(index: int, tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-c", blocks("python")[index]], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_figures_are_those_that_were_measured():
    results = ROOT / "benchmarks/results"
    measured = [line for name in ("quality", "peers") for line in (results / f"{name}.md").read_text().splitlines()]
    shown = [line for line in README.splitlines() if re.match(r"\| (bf16|int\d|nf4|fp)", line)]
    assert len(shown) > 8
    assert not [line for line in shown if line not in measured]


def test_every_file_that_it_names_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
