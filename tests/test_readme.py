"""Everything the README shows: its commands run, its Python runs, its figures are those of the committed results."""

from __future__ import annotations

import json
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


# What is imported, for seconds, is imported once; each piece then has a process of its own, in its own folder.
RUNNER = """
import json, os, shlex, sys
import whit.cli, whit.compiled, whit.evaluation, whit.integrations.loading

def run(piece):
    os.makedirs(piece["folder"], exist_ok=True)
    os.chdir(piece["folder"])
    for stream in (1, 2):
        os.dup2(os.open(piece["said"][stream - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if piece["kind"] == "python":
        exec(compile(piece["text"], "README", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = shlex.split(piece["text"], comments=True)
        whit.cli.main()
    sys.exit()

for piece in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        run(piece)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def ran(pieces: list[tuple[str, str, str]], folder: Path) -> list[tuple[int, str, str]]:
    """Exit status, standard output and error of pieces (kind, text, place below `folder`), one after the other."""
    said = [[str(folder / f"{i}.{name}") for name in ("out", "err")] for i in range(len(pieces))]
    orders = [
        {"kind": kind, "text": text, "folder": str(folder / place), "said": files}
        for (kind, text, place), files in zip(pieces, said, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], cwd=folder, input=json.dumps(orders), stdout=subprocess.PIPE, text=True,
        check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    texts = [[Path(file).read_text() for file in files] for files in said]
    return [(int(status), *both) for status, both in zip(done.stdout.split(), texts, strict=True)]


@pytest.mark.parametrize("number", range(len(blocks("bash"))))
def test_the_commands_run(number: int, tmp_path: Path):
    lines = blocks("bash")[number].splitlines()
    assert len(lines) >= 3
    first = [sys.executable, "-m", *shlex.split(lines[0], comments=True)]  # one from the very start
    assert subprocess.run(first, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    found = ran([("bash", line, ".") for line in lines[1:]], tmp_path)
    for line, (status, output, errors) in zip(lines[1:], found, strict=True):
        assert status == 0, f"{line}\n{errors}"
        assert output.strip(), line


def test_the_python_runs(tmp_path: Path):
    pieces = [("python", text, f"place{i}") for i, text in enumerate(blocks("python"))]
    assert len(pieces) >= 3
    assert len(blocks("bash")) == 2
    for status, output, errors in ran(pieces, tmp_path):
        assert status == 0, errors
        assert output.strip()


def test_the_figures_are_those_that_were_measured():
    results = ROOT / "benchmarks/results"
    measured = [line for name in ("quality", "peers") for line in (results / f"{name}.md").read_text().splitlines()]
    shown = [line for line in README.splitlines() if re.match(r"\| (bf16|int\d|nf4|fp)", line)]
    assert len(shown) > 8
    assert not [line for line in shown if line not in measured]


def test_every_file_that_it_names_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
