"""Instruction data: JSON lines to tokens, and which of them count in the loss.

A line is `{"prompt": TEXT, "response": TEXT}`, which become one text with the end-of-sequence token after it, or
`{"messages": [{"role", "content"}, ...]}`, which the tokenizer's chat template makes a text of. Only responses count:
the response, or what the template writes for each assistant's turn. Every line that cannot be used is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from whit.errors import TrainingError, reason_of

TooLong = Literal["cut", "drop", "refuse"]
NAMED = 10  # bad lines that an error lists
ROLES = ("system", "developer", "user", "assistant", "tool")
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids (n,) int64, and for each whether its loss counts (n,) bool; `line` is its place in the file."""

    tokens: Tensor
    trained: Tensor
    line: int

    @property
    def targets(self) -> int:
        """Tokens that are predicted and scored: the first one has nothing before it."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class Dataset:
    """Examples of at most a context's tokens; `cut` lost their ends, `dropped` are left out whole."""

    name: str
    examples: tuple[Example, ...]
    sha256: str
    cut: int = 0
    dropped: int = 0

    def to_json(self) -> dict[str, Any]:
        """As in whit.json."""
        return {
            "name": self.name, "sha256": self.sha256, "examples": len(self.examples), "cut": self.cut,
            "dropped": self.dropped, "tokens": sum(len(e.tokens) for e in self.examples),
            "response_tokens": sum(e.targets for e in self.examples),
        }  # fmt: skip


def read_examples(path: Path, tokenizer: Any, context: int, too_long: TooLong = "cut") -> Dataset:
    """The examples of a .jsonl file, in its order.

    Those longer than `context` tokens lose their ends (`cut`), are left out (`drop`) or refused; one whose prompt
    alone fills the context has nothing to learn from and is dropped. Raises TrainingError, which lists bad lines.
    """
    raw = _read(path)
    _check_tokenizer(tokenizer)
    found: list[Example] = []
    wrong: dict[str, list[int]] = {}
    for number, line in enumerate(raw.decode("utf-8").split("\n"), 1):
        if line.strip():
            try:
                found.append(_example(json.loads(line), tokenizer, number))
            except json.JSONDecodeError as error:
                reason = f"not JSON ({error}); every line must hold one object; correct it"
                wrong.setdefault(reason, []).append(number)
            except TrainingError as error:
                wrong.setdefault(str(error), []).append(number)
    if wrong:
        raise _bad_lines(path, wrong)
    if not found:
        raise TrainingError(f"{path}: holds no example; it must have a JSON object on each line; name another file")
    return _fitted(Dataset(path.name, tuple(found), sha256(raw).hexdigest()), path, context, too_long)


def _bad_lines(path: Path, wrong: Mapping[str, list[int]]) -> TrainingError:
    """Every reason once, with the lines that it holds for."""
    said = []
    for reason, lines in list(wrong.items())[:NAMED]:
        more = f" and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        numbers = ", ".join(map(str, lines[:NAMED]))
        said.append(f"{path}: line{'s' if len(lines) > 1 else ''} {numbers}{more}: {reason}")
    if (rest := sum(map(len, list(wrong.values())[NAMED:]))) > 0:
        said.append(f"... and {rest} more lines")
    return TrainingError("\n".join(said))


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise TrainingError(f"{path}: line {line}: not UTF-8; the file must be; convert it") from None
    except OSError as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or "cannot be read").lower()
        raise TrainingError(f"{path}: {said}; training needs a .jsonl file of examples; check the path") from None
    return raw


def _check_tokenizer(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise TrainingError(
            f"{type(tokenizer).__name__}: does not say which characters a token stands for; a fast tokenizer must be "
            "there to tell prompt from response; add tokenizer.json to the model"
        )


def _example(record: Any, tokenizer: Any, line: int) -> Example:
    if not isinstance(record, Mapping):
        raise TrainingError("not an object; it must have `prompt` and `response`, or `messages`; correct it")
    if "messages" in record:
        text, spans = _conversation(record["messages"], tokenizer)
        around: tuple[list[int], list[int]] = [], []
    else:
        text, spans = _pair(record)
        around = _around(tokenizer)
    before, after = around
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(first <= start < last for first, last in spans) for start, _ in encoded["offset_mapping"]]
    tokens = torch.tensor([*before, *encoded["input_ids"], *after], dtype=torch.int64)
    trained = torch.tensor([False] * len(before) + inside + [True] * len(after))
    example = Example(tokens, trained, line)
    if not example.targets:
        raise TrainingError("no token of a response is left to learn; a response must have one; correct it")
    return example


def _pair(record: Mapping[str, Any]) -> tuple[str, tuple[Span, ...]]:
    for key in ("prompt", "response"):
        if key not in record:
            has = ", ".join(map(str, record)) or "nothing"
            raise TrainingError(
                f"no `{key}` (it has {has}); it must have `prompt` and `response`, or `messages`; add it"
            )
        if not isinstance(record[key], str):
            raise TrainingError(f"`{key}` is {_kind(record[key])}; it must be a text; correct it")
    if not record["response"].strip():
        raise TrainingError("`response` is empty; there must be something to learn; remove the line")
    prompt, text = record["prompt"], record["prompt"] + record["response"]
    return text, ((len(prompt), len(text)),)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and the end of the sequence."""
    if tokenizer.eos_token_id is None:
        raise TrainingError("the tokenizer has no end-of-sequence token; a response must end; use `messages`")
    first: list[int] = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    starts = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return first if starts else [], [int(tokenizer.eos_token_id)]


def _conversation(turns: Any, tokenizer: Any) -> tuple[str, tuple[Span, ...]]:
    """The template's text, and where in it the assistant speaks: from the prompt for a turn to the turn's end."""
    _check_turns(turns)
    if not getattr(tokenizer, "chat_template", None):
        raise TrainingError("`messages` need a chat template and the tokenizer has none; use `prompt` and `response`")
    text = _rendered(turns, tokenizer)
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = _rendered(turns[:index], tokenizer, add_generation_prompt=True)
            up_to = _rendered(turns[: index + 1], tokenizer)
            if not (text.startswith(up_to) and up_to.startswith(before)):
                raise TrainingError(
                    f"messages[{index}]: the chat template rewrites earlier turns when later ones come; where the "
                    "response stands must be known; split the conversation, or use `prompt` and `response`"
                )
            spans.append((len(before), len(up_to)))
    return text, tuple(spans)


def _check_turns(turns: Any) -> None:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise TrainingError(f"`messages` is {_kind(turns)}; it must be a list of turns; correct it")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise TrainingError(f"messages[{index}]: no turn; it must have `role` and `content`; correct it")
        if turn["role"] not in ROLES:
            raise TrainingError(f"messages[{index}]: role {turn['role']!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(turn["content"], str):
            raise TrainingError(
                f"messages[{index}]: content is {_kind(turn['content'])}; it must be a text; correct it"
            )
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise TrainingError("no turn of the assistant says anything; there must be something to learn; remove the line")


def _rendered(turns: Sequence[Any], tokenizer: Any, **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
    except Exception as error:  # templates raise whatever they like
        raise TrainingError(
            f"the chat template refuses it ({type(error).__name__}: {reason_of(error)}); "
            "its turns must fit it; correct them"
        ) from None


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "an empty list" if not value else "a list"
    return "an object" if isinstance(value, Mapping) else "a text" if isinstance(value, str) else f"{value!r}"


def _fitted(data: Dataset, path: Path, context: int, too_long: TooLong) -> Dataset:
    long = [e for e in data.examples if len(e.tokens) > context]
    if long and too_long == "refuse":
        named = ", ".join(str(e.line) for e in long[:NAMED])
        raise TrainingError(
            f"{path}: {len(long)} examples are longer than {context} tokens (lines {named}"
            f"{', ...' if len(long) > NAMED else ''}); all must fit; use a longer --context, or --too-long cut"
        )
    kept = []
    for example in data.examples:
        if len(example.tokens) > context:
            if too_long == "drop":
                continue
            example = replace(example, tokens=example.tokens[:context], trained=example.trained[:context])
        if example.targets:
            kept.append(example)
    if not kept:
        raise TrainingError(
            f"{path}: no example has a response within {context} tokens; one must; use a longer --context"
        )
    lines = {example.line for example in long}
    cut = sum(example.line in lines for example in kept) if too_long == "cut" else 0
    return replace(data, examples=tuple(kept), cut=cut, dropped=len(data.examples) - len(kept))
