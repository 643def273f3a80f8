"""Instruction data: what counts in the loss, and every line that cannot be used named with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import whit
from whit.errors import TrainingError
from whit.training.data import Example, read_examples

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (  # as some reasoning models' templates: earlier answers are shortened when later ones come
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% else %}...{% endif %}\n{% endfor %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return hf.AutoTokenizer.from_pretrained(whit.resolve_model("whit:model"))


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def counted(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.tokens[example.trained])


def test_the_response_and_the_end_count(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", {"prompt": "Say it.\n", "response": "It was late."}, "")
    (example,) = read_examples(path, tokenizer, 64).examples
    assert tokenizer.decode(example.tokens) == "Say it.\nIt was late.<|endoftext|>"
    assert counted(example, tokenizer) == "It was late.<|endoftext|>"
    prompt = tokenizer("Say it.\n", add_special_tokens=False)["input_ids"]
    assert not example.trained[: len(prompt)].any()
    assert example.targets == len(example.tokens) - len(prompt)


def test_every_turn_of_the_assistant_counts(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    said = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello you"), ("user", "Bye"), ("assistant", "Later"))
    turns = [{"role": role, "content": content} for role, content in said]
    (example,) = read_examples(write(tmp_path / "d.jsonl", {"messages": turns}), tokenizer, 256).examples
    assert tokenizer.decode(example.tokens).startswith("<system>Be kind.</s>\n<user>Hi</s>\n<assistant>Hello you")
    assert counted(example, tokenizer) == "Hello you</s>\nLater</s>\n"


BAD = (
    ('{"prompt": "a"', "not JSON"),
    ("[1, 2]", "not an object"),
    ({"question": "a", "response": "b"}, r"no `prompt` \(it has question, response\)"),
    ({"prompt": "a", "response": None}, "`response` is null"),
    ({"prompt": ["a"], "response": "b"}, "`prompt` is a list"),
    ({"prompt": "a", "response": "  "}, "`response` is empty"),
    ({"messages": []}, "`messages` is an empty list"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: no turn"),
    ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\]: role 'robot'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
)


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_a_bad_line_is_named(tmp_path, tokenizer, record, reason):
    tokenizer.chat_template = CHATML
    good = {"prompt": "a", "response": "b"}
    with pytest.raises(TrainingError, match=f"d.jsonl: line 3: {reason}"):
        read_examples(write(tmp_path / "d.jsonl", good, "", record, good), tokenizer, 64)


def test_all_bad_lines_are_listed_at_once(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", *["{"] * 3, {"prompt": "a", "response": ""}, *["[]"] * 20)
    with pytest.raises(TrainingError) as raised:
        read_examples(path, tokenizer, 64)
    lines = str(raised.value).splitlines()
    assert ["line 4: `response`" in line for line in lines].count(True) == 1
    assert len(lines) == 3  # each reason once, with the lines that it holds for
    assert "lines 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 and 10 more: not an object" in lines[-1]
    path = write(tmp_path / "e.jsonl", *[{"messages": [{"role": f"r{i}", "content": "a"}]} for i in range(24)])
    with pytest.raises(TrainingError, match=r"line 10: .*\n\.\.\. and 14 more lines$"):
        read_examples(path, tokenizer, 64)


def test_files_that_hold_no_examples(tmp_path, tokenizer):
    (tmp_path / "latin").write_bytes(b'{"prompt": "a", "response": "b"}\n\xe9\n')
    for path, reason in (
        (tmp_path / "none", "no such file"),
        (write(tmp_path / "empty", ""), "no example"),
        (tmp_path / "latin", "line 2: not UTF-8"),
    ):
        with pytest.raises(TrainingError, match=reason):
            read_examples(path, tokenizer, 64)


def test_templates_that_cannot_be_followed(tmp_path, tokenizer):
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    path = write(tmp_path / "d.jsonl", {"messages": turns})
    with pytest.raises(TrainingError, match="line 1: `messages` need a chat template"):
        read_examples(path, tokenizer, 64)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(TrainingError, match=r"line 1: messages\[1\]: the chat template rewrites"):
        read_examples(path, tokenizer, 64)
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(TrainingError, match=r"refuses it .*Roles must alternate\); "):
        read_examples(path, tokenizer, 64)


def test_long_examples_are_cut_dropped_or_refused_and_counted(tmp_path, tokenizer):
    long_response = {"prompt": "a", "response": "word " * 50}
    long_prompt = {"prompt": "word " * 50, "response": "b"}
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "response": "b"}, long_response, long_prompt)
    cut = read_examples(path, tokenizer, 20, "cut")
    assert (len(cut.examples), cut.cut, cut.dropped) == (2, 1, 1)
    assert [e.line for e in cut.examples] == [1, 2]
    assert len(cut.examples[1].tokens) == 20
    dropped = read_examples(path, tokenizer, 20, "drop")
    assert (len(dropped.examples), dropped.cut, dropped.dropped) == (1, 0, 2)
    with pytest.raises(TrainingError, match=r"2 examples are longer than 20 tokens \(lines 2, 3\)"):
        read_examples(path, tokenizer, 20, "refuse")
    with pytest.raises(TrainingError, match="no example has a response within 20 tokens"):
        read_examples(write(tmp_path / "p.jsonl", long_prompt), tokenizer, 20)
