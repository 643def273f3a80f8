"""Text for the tiny models: words w0 to w127, and a tokenizer whose vocabulary they are, one token a word."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(vocabulary: int = 128, unknown: str = "w0") -> PreTrainedTokenizerFast:
    """The words w0, w1 ... parted by spaces, to their numbers."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown)


def random_words(count: int, first: int, seed: int) -> list[int]:
    """Numbers of `count` words, drawn evenly from `first` to 127."""
    return torch.randint(first, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def write_words(folder: Path, words: Iterable[int]) -> Path:
    """A text file of the words with these numbers, in `folder`."""
    path = folder / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in words))
    return path
