"""Run the tutorial pages: python docs/execute.py [--write] [PAGE ...]

A page's ```python and ```bash blocks are run in order, in one namespace and one empty folder; a ```text block shows
what the block before it printed. Without --write, what differs is an error (numbers may differ by 2 %, because
processors round differently); with --write the pages are brought up to date.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PAGES = Path(__file__).parent / "tutorial"
BLOCK = re.compile(r"^```(python|bash|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
TOLERANCE = 0.02


def run_page(source: str) -> tuple[str, list[str]]:
    """The page with every text block as it is printed now, and what differed."""
    namespace: dict[str, Any] = {"__name__": "page"}
    pieces, position, said, differences = [], 0, "", []
    with in_empty_folder(), torch.random.fork_rng():
        for match in BLOCK.finditer(source):
            pieces.append(source[position : match.start()])
            position = match.end()
            kind, content = match[1], match[2]
            if kind == "text":
                if not alike(content, said):
                    differences.append(f"the page shows\n{content}\nand it prints\n{said}")
                content = said
            else:
                said = run_python(content, namespace) if kind == "python" else run_commands(content)
            pieces.append(f"```{kind}\n{content}```")
    return "".join(pieces) + source[position:], differences


def run_python(code: str, namespace: dict[str, Any]) -> str:
    """What a block prints."""
    with contextlib.redirect_stdout(io.StringIO()) as screen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "page", "exec"), namespace)
    return tidy(screen.getvalue())


def run_commands(lines: str) -> str:
    """What the commands of `whit` in a block print, in this process."""
    from whit.cli import main

    before, screen = sys.argv, io.StringIO()
    try:
        for line in lines.splitlines():
            words = shlex.split(line, comments=True)
            if words and run_command(words, main, screen):
                raise RuntimeError(f"{line}: failed")
    finally:
        sys.argv = before
    return tidy(screen.getvalue())


def run_command(words: list[str], main: Callable[[], None], screen: io.StringIO) -> object:
    """One command's exit status."""
    sys.argv = words
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as leave:
            return leave.code
    return 0


@contextlib.contextmanager
def in_empty_folder() -> Iterator[None]:
    """Commands and code write here."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def tidy(text: str) -> str:
    """No spaces at the ends of lines, one line feed at the end."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def alike(left: str, right: str) -> bool:
    """The same words, and numbers within the tolerance."""
    if NUMBER.sub("#", left).split() != NUMBER.sub("#", right).split():
        return False
    pairs = zip(NUMBER.findall(left), NUMBER.findall(right), strict=True)
    values = ((float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs)
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in values)


def main() -> None:
    names = [argument for argument in sys.argv[1:] if argument != "--write"]
    wrong = 0
    for path in [PAGES / name for name in names] or sorted(PAGES.glob("*.md")):
        page, differences = run_page(path.read_text())
        print(f"{path.name}: {'as it was' if not differences else f'{len(differences)} outputs differ'}")
        if "--write" in sys.argv:
            path.write_text(page)
        else:
            wrong += len(differences)
            print(*differences, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
