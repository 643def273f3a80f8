"""From a calibration text to seeded token windows, hashed so that a result can say what it was made with.

Each sample begins at a random character of the text, after the next white space, and runs for `context` tokens. Only
what is sampled is tokenised. An encoder's windows stand between the tokens that frame a sequence ([CLS] ... [SEP]), on
which its outliers often lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.data import resolve_text
from whit.data.texts import read_text
from whit.errors import CalibrationError
from whit.named import require
from whit.randomness import check_seed

DEFAULT_CONTEXT = 2048
GUESS = 8  # characters per token that a first cut allows; more where they do not suffice


class CalibrationTokens:
    """`samples` windows of `context` tokens, which `draw` makes when they are first asked for: many take their time,
    and a plan wants their number alone."""

    def __init__(self, samples: int, context: int, draw: Callable[[], Tensor]) -> None:
        self.samples, self.context, self._draw = samples, context, draw

    @classmethod
    def of(cls, tokens: Tensor) -> CalibrationTokens:
        """Windows that are there, int64 (samples, context)."""
        samples, context = tokens.shape
        return cls(samples, context, lambda: tokens)

    @cached_property
    def tokens(self) -> Tensor:
        """int64 (samples, context)."""
        return self._draw()

    @cached_property
    def sha256(self) -> str:
        """Of the tokens' little-endian bytes."""
        return sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def count(self) -> int:
        """Tokens in all windows."""
        return self.samples * self.context

    def to_json(self) -> dict[str, Any]:
        """As in whit.json."""
        return {"sha256": self.sha256, "samples": self.samples, "context": self.context, "tokens": self.count}


@dataclass(frozen=True)
class Calibration:
    """The text of a calibration: `samples` windows of `context` tokens, drawn by `seed`.

    `text` is a text file, a .jsonl file, `whit:text`, which ships with whit, or the texts themselves: a list of
    strings, which are joined by empty lines. Without `context` it is 2048, or what the model was built for if that is
    less. CalibrationError for what cannot be a calibration.
    """

    text: str | Path | Sequence[str] = "whit:text"
    samples: int = 128
    context: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not isinstance(self.text, str | Path):
            advice = "it must be a file, whit:text, or a list of texts (strings); give one"
            require(self.text, Sequence, "calibration", advice, CalibrationError)
            for text in self.text:
                require(text, str, "calibration: a text", advice, CalibrationError)
            object.__setattr__(self, "text", tuple(self.text))
        for name, number in (("samples", self.samples), ("context", self.context)):
            require(number, int | None, f"calibration: {name}", "it must be a whole number", CalibrationError)
        if self.samples < 1 or (self.context is not None and self.context < 2):
            asked = f"{self.samples} samples of {self.context} tokens"
            raise CalibrationError(f"calibration: {asked}; at least one of two tokens is needed; ask for more")

    def tokens(self, tokenizer: Any, max_context: int | None = None) -> CalibrationTokens:
        """The windows; CalibrationError where the text is missing, unreadable or shorter than one of them."""
        context = self._context(max_context)
        text = self._whole(tokenizer)
        first, last = _frame(tokenizer) if context > 2 else ([], [])
        inner = context - len(first) - len(last)
        self._window(text, 0, inner, tokenizer)  # a text that is too short is said at once

        def draw() -> Tensor:
            generator = torch.Generator().manual_seed(self.seed)
            starts = torch.randint(len(text), (self.samples,), generator=generator).tolist()
            return torch.tensor([[*first, *self._window(text, start, inner, tokenizer), *last] for start in starts])

        return CalibrationTokens(self.samples, context, draw)

    @property
    def name(self) -> str:
        """As an error calls it."""
        return str(self.text) if isinstance(self.text, str | Path) else "the calibration texts"

    def _whole(self, tokenizer: Any) -> str:
        if isinstance(self.text, str | Path):
            return read_text(resolve_text(str(self.text)), tokenizer, CalibrationError, "--calibration")
        whole = "\n\n".join(self.text)
        if not whole.strip():
            raise CalibrationError(f"{self.name}: are empty; they must hold words; give others")
        return whole

    def _context(self, most: int | None) -> int:
        if self.context is None:
            return min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT)
        if most is not None and self.context > most:
            raise CalibrationError(
                f"calibration: context {self.context}; the model was built for {most} positions; use --context {most}"
            )
        return self.context

    def _window(self, text: str, start: int, context: int, tokenizer: Any) -> list[int]:
        """`context` tokens from the first word after `start`; near the end, from anywhere in the last piece."""
        width = GUESS * context
        while True:
            first = min(start, max(len(text) - width, 0))
            piece = text[first : first + width]
            words = piece.split(maxsplit=1) if first else [piece]
            ids: list[int] = tokenizer(words[-1], add_special_tokens=False, verbose=False)["input_ids"]
            if first + width < len(text):
                if len(ids) > context:  # the last token may be half a word
                    return ids[:context]
            elif len(ids) >= context:
                offset = start % (len(ids) - context + 1)
                return ids[offset : offset + context]
            elif not first:
                raise CalibrationError(
                    f"{self.name}: {len(ids)} tokens; a sample has {context}; use a longer text or a smaller --context"
                )
            width *= 2


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and behind every sequence of an encoder; nothing for other models."""
    first, last = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    return ([], []) if first is None or last is None else ([first], [last])
