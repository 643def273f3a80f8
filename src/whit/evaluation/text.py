"""From a text file to the windows that are scored.

The convention of the GPTQ literature: the whole text is tokenised once without special tokens and cut into
consecutive windows of `context` tokens. The last, partial window is dropped; a text shorter than one window is one
short window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.data import texts
from whit.errors import EvaluationError

DEFAULT_CONTEXT = 2048


def read_text(path: Path, tokenizer: Any = None) -> str:
    """The text of a file, of JSON lines their texts (`data.texts`); EvaluationError where it cannot be used."""
    return texts.read_text(path, tokenizer, EvaluationError, "--text")


def tokenize(text: str, tokenizer: Any, max_tokens: int | None, where: str) -> Tensor:
    """The first `max_tokens` tokens of the text, int64 [tokens]; no special tokens are added."""
    if max_tokens is not None and max_tokens < 2:
        raise EvaluationError(f"max_tokens {max_tokens}: too few; perplexity needs at least two tokens; ask for more")
    # verbose=False: the tokenizer's warning about its model_max_length does not apply, windows come after
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids[:max_tokens], dtype=torch.int64)
    if tokens.numel() < 2:
        raise EvaluationError(f"{where}: is {tokens.numel()} tokens; perplexity needs at least two; name another")
    return tokens


def choose_context(asked: int | None, maximum: int | None) -> int:
    """The window length: as asked, or 2048 clipped to what the model was built for."""
    if asked is None:
        return DEFAULT_CONTEXT if maximum is None else min(DEFAULT_CONTEXT, maximum)
    if asked < 2:
        raise EvaluationError(f"context {asked}: too short; a window needs at least two tokens; use 2 or more")
    if maximum is not None and asked > maximum:
        raise EvaluationError(f"context {asked}: the model was built for {maximum} positions; use --context {maximum}")
    return asked


def cut_windows(tokens: Tensor, context: int) -> Tensor:
    """int64 [windows, context], or [1, tokens] where the text is shorter than one window."""
    whole = tokens.numel() // context
    if whole == 0:
        return tokens.unsqueeze(0)
    return tokens[: whole * context].reshape(whole, context)
