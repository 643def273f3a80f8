"""A user's text: UTF-8, every line end a newline, so that a CRLF file is read like its LF copy.

JSON lines (.jsonl, .ndjson) are one text: the `text` of each record, or its conversation in the chat template of the
model, the records in the order of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whit.errors import WhitError, reason_of


def read_text(path: Path, tokenizer: Any, error: type[WhitError], option: str) -> str:
    """The text of a file, which an `option` of the command line names.

    Raises `error` for a file that is missing, empty or in another encoding, and a record that holds no text. Without a
    tokenizer conversations are read as their turns, one after another.
    """
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as reason:
        said = (reason.strerror or "cannot be read").lower()
        raise error(f"{path}: {said}; a text must be there; name one with {option}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path}: byte {reason.start} is not UTF-8; the text must be; convert the file") from None
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            lines = enumerate(text.split("\n"), 1)  # other line ends may stand in a string of JSON
            text = "\n\n".join(_record(line, f"{path}: line {n}", tokenizer) for n, line in lines if line.strip())
    except ValueError as reason:
        raise error(str(reason)) from None
    if not text.strip():
        raise error(f"{path}: the text is empty; there must be words in it; name another file")
    return text


def _record(line: str, where: str, tokenizer: Any) -> str:
    """The text of one record; ValueError is a sentence."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); every line must hold one object; correct it") from None
    if isinstance(record, Mapping):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        turns = record.get("messages")
        if turns is None and {"prompt", "response"} <= set(record):
            pairs = (("user", record["prompt"]), ("assistant", record["response"]))
            turns = [{"role": role, "content": content} for role, content in pairs]
        if turns is not None:
            return _conversation(turns, where, tokenizer)
    raise ValueError(f"{where}: no text in it; it must have `text`, `messages`, or `prompt` and `response`; correct it")


def _conversation(turns: list[dict[str, str]], where: str, tokenizer: Any) -> str:
    try:
        if getattr(tokenizer, "chat_template", None):
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        return "\n".join(turn["content"] for turn in turns)
    except Exception as error:  # templates raise whatever they like
        raise ValueError(
            f"{where}: not a conversation ({type(error).__name__}: {reason_of(error)}); "
            "its turns must have `role` and `content`; correct it"
        ) from None
