"""The built-in tasks: their local files, and the prompts that lm-evaluation-harness makes of them.

| task          | file (in DIR, DIR/zeroshot, DIR/<task>)  | prompt                                   | metric   |
|---------------|------------------------------------------|------------------------------------------|----------|
| piqa          | piqa.jsonl                               | Question: ...\\nAnswer:                   | acc_norm |
| arc_easy      | arc_easy.jsonl                           | Question: ...\\nAnswer:                   | acc_norm |
| arc_challenge | arc_challenge.jsonl                      | Question: ...\\nAnswer:                   | acc_norm |
| openbook_qa   | openbook_qa.jsonl                        | the stem alone                           | acc_norm |
| hellaswag     | hellaswag.txt, hellaswag_val_full.txt    | the context alone                        | acc_norm |
| boolq         | boolq.jsonl                              | passage\\nQuestion: ...?\\nAnswer: yes/no  | acc      |
| copa          | copa.jsonl                               | premise because/therefore                | acc      |
| winogrande    | winogrande.jsonl                         | one context for each option, same ending | acc      |
| lambada       | lambada.jsonl, lambada_test.jsonl        | all but the last word                    | acc      |

acc_norm divides a choice's log-likelihood by its length in characters (the harness's own rule); acc does not divide;
for lambada, acc asks that every token of the last word is the model's first choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whit.errors import EvaluationError


@dataclass(frozen=True)
class Item:
    """Pairs of (context, continuation) to score, the length of each choice in characters, and the right one."""

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """One built-in task; `harness_name` is what lm-evaluation-harness calls it."""

    name: str
    harness_name: str
    files: tuple[str, ...]
    metric: str
    parse: Callable[[str], list[Item]]

    def read(self, folder: Path, limit: int | None) -> list[Item]:
        """The first `limit` items of the task's file below `folder`. Raises EvaluationError."""
        places = [folder / sub / name for sub in ("", "zeroshot", self.name) for name in self.files]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise EvaluationError(f"task {self.name}: {folder} holds no {' or '.join(self.files)}; check --task-data")
        try:
            items = self.parse(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise EvaluationError(f"{path}: is not in the form that task {self.name} reads ({said})") from error
        if not items:
            raise EvaluationError(f"{path}: holds no item; task {self.name} needs at least one; check the file")
        return items[:limit]


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _choices(prompt: str, choices: list[str], gold: int) -> Item:
    if not 0 <= gold < len(choices):
        raise ValueError(f"gold {gold} of {len(choices)} choices")
    return Item(tuple((prompt, " " + choice) for choice in choices), tuple(map(len, choices)), gold)


def _questions(text: str) -> list[Item]:
    return [_choices(row["query"].rstrip() + "\nAnswer:", row["choices"], row["gold"]) for row in _rows(text)]


def _boolq(text: str) -> list[Item]:
    rows = [{**row, "query": row["query"].removeprefix("Passage: ")} for row in _rows(text)]
    return _questions("\n".join(json.dumps(row) for row in rows))


def _stems(text: str) -> list[Item]:
    return [_choices(row["query"], row["choices"], row["gold"]) for row in _rows(text)]


def _copa(text: str) -> list[Item]:
    # the harness writes "The man turned on the faucet therefore", without a comma
    items = []
    for row in _rows(text):
        query = re.sub(r",? (because|therefore)$", r" \1", row["query"].strip())
        items.append(_choices(query, row["choices"], row["gold"]))
    return items


def _winogrande(text: str) -> list[Item]:
    items = []
    for row in _rows(text):
        contexts, ending = row["context_options"], row["continuation"]
        if not 0 <= row["gold"] < len(contexts):
            raise ValueError(f"gold {row['gold']} of {len(contexts)} contexts")
        pairs = tuple((context, " " + ending) for context in contexts)
        items.append(Item(pairs, (len(ending),) * len(pairs), row["gold"]))
    return items


def _hellaswag(text: str) -> list[Item]:
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are not whole items of six")
    return [
        _choices(lines[start], lines[start + 2 : start + 6], int(lines[start + 1])) for start in range(0, len(lines), 6)
    ]


def _lambada(text: str) -> list[Item]:
    items = []
    for row in _rows(text):
        context, _, word = row["text"].rpartition(" ")
        if not context:
            raise ValueError("a passage of one word has no context")
        items.append(Item(((context, " " + word),), (len(word),), 0))
    return items


TASKS = (
    Task("piqa", "piqa", ("piqa.jsonl",), "acc_norm", _questions),
    Task("arc_easy", "arc_easy", ("arc_easy.jsonl",), "acc_norm", _questions),
    Task("arc_challenge", "arc_challenge", ("arc_challenge.jsonl",), "acc_norm", _questions),
    Task("openbook_qa", "openbookqa", ("openbook_qa.jsonl",), "acc_norm", _stems),
    Task("hellaswag", "hellaswag", ("hellaswag.txt", "hellaswag_val_full.txt"), "acc_norm", _hellaswag),
    Task("boolq", "boolq", ("boolq.jsonl",), "acc", _boolq),
    Task("copa", "copa", ("copa.jsonl",), "acc", _copa),
    Task("winogrande", "winogrande", ("winogrande.jsonl",), "acc", _winogrande),
    Task("lambada", "lambada_openai", ("lambada.jsonl", "lambada_test.jsonl"), "greedy", _lambada),
)


def builtin(name: str) -> Task | None:
    """The built-in task of this name, or None."""
    return next((task for task in TASKS if task.name == name), None)
