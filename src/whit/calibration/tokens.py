"""From a calibration text to seeded token windows, hashed so that a result can say what it was made with.

Each sample begins at a random character of the text, after the next white space, and runs for `context` tokens. Only
what is sampled is tokenised. An encoder's windows stand between the tokens that frame a sequence ([CLS] ... [SEP]), on
which its outliers often lie. JSON lines are one text: the `text` of each record, or its conversation in the chat
template of the model, the records in the order of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.data import resolve_text
from whit.errors import CalibrationError
from whit.randomness import check_seed

DEFAULT_CONTEXT = 2048
GUESS = 8  # characters per token that a first cut allows; more where they do not suffice


@dataclass(frozen=True)
class CalibrationTokens:
    """Token windows int64 (samples, context), and the SHA-256 of their little-endian bytes."""

    tokens: Tensor
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As in whit.json."""
        samples, context = self.tokens.shape
        return {"sha256": self.sha256, "samples": samples, "context": context, "tokens": samples * context}


@dataclass(frozen=True)
class Calibration:
    """`samples` windows of `context` tokens from a text file, a .jsonl file, or `whit:text`, which ships with whit.

    Without `context` it is 2048, or what the model was built for where that is less.
    """

    text: str | Path = "whit:text"
    samples: int = 128
    context: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.samples < 1 or (self.context is not None and self.context < 2):
            asked = f"{self.samples} samples of {self.context} tokens"
            raise CalibrationError(f"calibration: {asked}; at least one of two tokens is needed; ask for more")

    def tokens(self, tokenizer: Any, max_context: int | None = None) -> CalibrationTokens:
        """Draw the windows; CalibrationError where the text is missing, unreadable or shorter than one of them."""
        context = self._context(max_context)
        text = _read(resolve_text(str(self.text)), tokenizer)
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(text), (self.samples,), generator=generator).tolist()
        first, last = _frame(tokenizer) if context > 2 else ([], [])
        inner = context - len(first) - len(last)
        windows = [self._window(text, start, inner, tokenizer) for start in starts]
        tokens = torch.tensor([[*first, *window, *last] for window in windows])
        return CalibrationTokens(tokens, sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest())

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
                    f"{self.text}: {len(ids)} tokens; a sample has {context}; use a longer text or a smaller --context"
                )
            width *= 2


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and behind every sequence of an encoder; nothing for other models."""
    first, last = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    return ([], []) if first is None or last is None else ([first], [last])


def _read(path: Path, tokenizer: Any) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or "cannot be read").lower()
        )
        raise CalibrationError(f"{path}: {reason}; calibration needs a text; name one with --calibration") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: byte {error.start} is not UTF-8; the text must be; convert the file") from None
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = enumerate(text.splitlines(), 1)
        text = "\n\n".join(_record(line, f"{path}: line {n}", tokenizer) for n, line in lines if line.strip())
    if not text.strip():
        raise CalibrationError(f"{path}: the text is empty; calibration needs words; name another file")
    return text


def _record(line: str, where: str, tokenizer: Any) -> str:
    """The text of one record of a .jsonl file."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where}: not JSON ({error}); every line must hold one object; correct it") from None
    if isinstance(record, Mapping):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        turns = record.get("messages")
        if turns is None and {"prompt", "response"} <= set(record):
            pairs = (("user", record["prompt"]), ("assistant", record["response"]))
            turns = [{"role": role, "content": content} for role, content in pairs]
        if turns is not None:
            return _conversation(turns, where, tokenizer)
    raise CalibrationError(f"{where}: no text in it; it must have `text`, `messages`, or `prompt` and `response`")


def _conversation(turns: list[dict[str, str]], where: str, tokenizer: Any) -> str:
    try:
        if tokenizer.chat_template:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        return "\n".join(turn["content"] for turn in turns)
    except Exception as error:  # templates raise whatever they like
        reason = str(error).strip().splitlines()[:1]
        raise CalibrationError(
            f"{where}: not a conversation ({type(error).__name__}: {''.join(reason)}); "
            "its turns must have `role` and `content`; correct it"
        ) from None
