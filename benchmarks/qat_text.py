"""The texts of `qat.py`: what is trained and calibrated on, and what is measured, as runs of tokens in OUT/tokens.

Training and calibration read Wikipedia articles (WikiText-2's are left out); every other one is spaced as WikiText
spaces its own (` , `, ` @-@ `, ` = Title = `), since half of what is measured looks so. All ways get the same text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy
import torch
from torch import Tensor

from whit.integrations.loading import load_tokenizer

BETWEEN = "<|endoftext|>"  # articles
PIECE = 200_000  # characters that are tokenized at once
CALIBRATION = 12_000_000  # characters of the training text that calibration draws its windows from
HELD_OUT = 64  # windows at the end of the training text that are never trained on
TRAIN, TEST, VALID = "train", "wikitext2", "wiki_valid"
SOURCES = {TRAIN: "data/text/wiki_train.txt", TEST: "data/wikitext2/wiki.test.raw", VALID: "data/text/wiki_valid.txt"}
SPACED = (
    (re.compile(r"(?<=\d),(?=\d)"), " @,@ "), (re.compile(r"(?<=\d)\.(?=\d)"), " @.@ "),
    (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "), (re.compile(r"(?<=\w)'(?=\w)"), " '"),
    (re.compile(r"\s*([–—…;:!?()\[\]\"“”%$£€])\s*"), r" \1 "), (re.compile(r"(?<!@),(?!@)"), " ,"),
    (re.compile(r"(?<=[^\s.][^\s.])\.(?=\s|$)"), " ."), (re.compile(r" +"), " "),
)  # fmt: skip
HEADING = re.compile(r"[A-Z0-9][^.,;]{1,60}\.")


def prepare(model: str, shared: Path, folder: Path) -> None:
    """Make what is not there yet; only then are the texts themselves needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        path = folder / f"{name}.npy"
        if path.exists() and (name != TRAIN or calibration_text(folder).exists()):
            continue
        text = (shared / source).read_text(encoding="utf-8")
        if name == TRAIN:
            text = every_other_spaced(text)
            calibration_text(folder).write_text(text[:CALIBRATION], encoding="utf-8")
        whole = _tokens(model, text, pieces=name == TRAIN)
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        numpy.save(temporary, whole.astype(numpy.uint16) if whole.max() < 1 << 16 else whole)
        os.replace(temporary, path)


def calibration_text(folder: Path) -> Path:
    """Where the text lies that calibration draws from."""
    return folder / "calibration.txt"


def stream(folder: Path, name: str, most: int | None = None) -> Tensor:
    """A prepared text as int64 tokens in one run."""
    found = torch.from_numpy(numpy.load(folder / f"{name}.npy").astype(numpy.int64))
    return found[:most] if most else found


def every_other_spaced(text: str) -> str:
    """Articles in turn as they are and as WikiText has them."""
    articles = [article.strip("\n") for article in text.split(BETWEEN)]
    return "".join(
        f"{spaced(article)}\n" if number % 2 else f"{article}\n\n{BETWEEN}\n\n"
        for number, article in enumerate(articles)
    )


def spaced(article: str) -> str:
    """An article, the title in its first line, with WikiText's spaces."""
    title, *lines = article.split("\n")
    found = [f" = {_apart(title)} = ", ""]
    for line in lines:
        if HEADING.fullmatch(line) and len(line.split()) <= 6:
            found += ["", f" = = {_apart(line[:-1])} = = ", ""]
        elif line.strip():
            found.append(f" {_apart(line)} ")
    return "\n".join(found)


def _apart(line: str) -> str:
    for pattern, there in SPACED:
        line = pattern.sub(there, line)
    return line.strip()


def _tokens(model: str, text: str, pieces: bool) -> numpy.ndarray:
    tokenizer = load_tokenizer(model)
    cut = [text[i : i + PIECE] for i in range(0, len(text), PIECE)] if pieces else [text]
    rows = tokenizer(cut, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return numpy.concatenate([numpy.asarray(row, dtype=numpy.int32) for row in rows])
