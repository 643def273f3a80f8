"""Zero-shot tasks against a direct computation, one choice at a time, on a tiny random model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from whit.errors import EvaluationError
from whit.evaluation import EvaluationOptions, Silent, evaluate
from whit.evaluation.tasks import TASKS, builtin
from whit.evaluation.zeroshot import Scorer, _score

NOUNS = ("weights", "text", "numbers", "models", "it", "reading", "a very long answer indeed")


def questions(count, choices, query):
    rng = np.random.default_rng(choices)
    return [
        {
            "query": query.format(n=number),
            "choices": [str(word) for word in rng.permutation(NOUNS)[:choices]],
            "gold": int(rng.integers(choices)),
        }
        for number in range(count)
    ]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write(folder / "zeroshot/piqa.jsonl", questions(12, 2, "Question: item {n}?\n"))
    write(folder / "zeroshot/arc_easy.jsonl", questions(12, 4, "Question: item {n}?"))
    write(folder / "arc_challenge.jsonl", questions(12, 4, "Question: hard {n}?"))
    write(folder / "openbook_qa/openbook_qa.jsonl", questions(12, 4, "Stem {n}:"))
    write(folder / "copa.jsonl", questions(12, 2, "It was {n}, because"))
    rows = [{**row, "choices": ["no", "yes"]} for row in questions(12, 2, "Passage: of {n}.\nQuestion: is it?")]
    write(folder / "boolq.jsonl", rows)
    rows = [{"context_options": [f"A{n} saw", f"B{n} saw"], "continuation": "it.", "gold": n % 2} for n in range(12)]
    write(folder / "winogrande.jsonl", rows)
    write(folder / "lambada/lambada_test.jsonl", [{"text": f"passage {n} ends with word"} for n in range(6)])
    rows = questions(12, 4, "A person: reads {n}")
    lines = [line for row in rows for line in (row["query"], str(row["gold"]), *row["choices"])]
    (folder / "hellaswag").mkdir()
    (folder / "hellaswag/hellaswag_val_full.txt").write_text("\n".join(lines) + "\n")
    return folder


def prompts(name, folder):
    """(contexts, continuations, lengths, gold) of every item, written out again by hand."""
    path = next(folder.rglob(f"{name}*"))
    path = next(path.rglob("*.*")) if path.is_dir() else path
    if name == "hellaswag":
        lines = path.read_text().splitlines()
        groups = [lines[i : i + 6] for i in range(0, len(lines), 6)]
        rows = [{"query": group[0], "gold": int(group[1]), "choices": group[2:]} for group in groups]
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if name == "winogrande":
            yield row["context_options"], [" it.", " it."], [3, 3], row["gold"]
        elif name == "lambada":
            yield [row["text"][: -len(" word")]], [" word"], [4], 0
        else:
            query = row["query"]
            if name in ("piqa", "arc_easy", "arc_challenge", "boolq"):
                query = query.strip().replace("Passage: ", "") + "\nAnswer:"
            query = query.replace(", because", " because")
            choices = row["choices"]
            yield [query] * len(choices), [" " + c for c in choices], [len(c) for c in choices], row["gold"]


def reference_score(model, tokenizer, context, continuation):
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids)))
    return total, all(int(log_p[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_equals_the_reference(make_model, tokenizer, task_data, text_file, tmp_path, name):
    folder = make_model(tmp_path, seed=4, max_position_embeddings=128)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    hits = []
    for contexts, continuations, lengths, gold in prompts(name, task_data):
        scores = [reference_score(model, tokenizer, c, e) for c, e in zip(contexts, continuations, strict=True)]
        if name == "lambada":
            hits.append(scores[0][1])
            continue
        normal = name not in ("boolq", "copa", "winogrande")
        values = [s / n if normal else s for (s, _), n in zip(scores, lengths, strict=True)]
        hits.append(int(np.argmax(values)) == gold)
    options = EvaluationOptions(text=str(text_file), max_tokens=64, tasks=(name,), task_data=task_data)
    got = evaluate(str(folder), options).tasks[name]
    assert got.items == len(hits)
    assert got.accuracy == pytest.approx(np.mean(hits))
    assert got.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
    assert got.metric == ("acc_norm" if name in ("piqa", "hellaswag") or name[:4] in ("arc_", "open") else "acc")


def test_scores_equal_the_reference_in_any_batch(tiny, tokenizer):
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    pairs = [("The text", " reads"), ("The text ", "reads"), ("A", " model writes numbers"), ("The", " text")]
    pairs += [(f"number {n}" * (1 + n % 3), " ends") for n in range(80)]
    scores = Scorer(model, tokenizer, 64).score(pairs, "pairs", Silent())
    for (context, continuation), got in zip(pairs, scores, strict=True):
        want, greedy = reference_score(model, tokenizer, context.rstrip(), " " + continuation.lstrip())
        assert got.log_likelihood == pytest.approx(want, rel=1e-4)
        assert got.greedy == greedy
    assert scores[0] == scores[1]  # a trailing space of the context belongs to the continuation


def test_greedy_is_true_for_the_models_own_choice(tiny, tokenizer):
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    ids = tokenizer("The text", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0]
    best, worst = int(logits[-1].argmax()), int(logits[-1].argmin())
    assert _score(logits, (best,)).greedy
    assert _score(logits, (best,)).log_likelihood == pytest.approx(float(logits[-1].log_softmax(-1).max()), rel=1e-5)
    assert not _score(logits, (worst,)).greedy
    assert not _score(logits, (worst, best)).greedy


def test_long_inputs_lose_tokens_on_the_left_and_it_is_said(tiny, tokenizer):
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    notes = []
    listener = type("Hear", (Silent,), {"note": lambda self, said: notes.append(said)})()
    long = "x" * 100 + " reads well"
    got = Scorer(model, tokenizer, 64).score([(long, " now")], "pairs", listener)[0]
    want, _ = reference_score(model, tokenizer, long[-61:], " now")
    assert got.log_likelihood == pytest.approx(want, rel=1e-4)
    assert notes == ["task pairs: 1 of 1 inputs were cut on the left to 64 tokens"]
    with pytest.raises(EvaluationError, match="longer than the model's 64 positions"):
        Scorer(model, tokenizer, 64).score([("A", " b" * 40)], "pairs", listener)


def test_limit_takes_the_first_items(tiny, task_data, text_file):
    options = EvaluationOptions(
        text=str(text_file), max_tokens=64, tasks=("piqa", "copa"), task_data=task_data, limit=1
    )
    got = evaluate(str(tiny), options)
    assert list(got.tasks) == ["piqa", "copa"]
    assert got.tasks["piqa"].items == 1
    assert got.to_json()["tasks"]["piqa"]["stderr"] is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("piqa", "{broken", "is not in the form"),
        ("piqa", '{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold 2 of 2 choices"),
        ("piqa", "", "holds no item"),
        ("piqa", '{"choices": ["a"], "gold": 0}', "KeyError"),
        ("lambada", '{"text": "word"}', "one word"),
        ("hellaswag", "a\n0\nb\n", "whole items of six"),
    ],
)
def test_task_files_that_cannot_be_read(tmp_path, name, content, said):
    suffix = "txt" if name == "hellaswag" else "jsonl"
    (tmp_path / f"{name}.{suffix}").write_text(content)
    with pytest.raises(EvaluationError, match=said):
        builtin(name).read(tmp_path, None)


def test_tasks_are_refused_before_weights_are_read(tmp_path, monkeypatch):
    def ask(**changes):
        evaluate(str(tmp_path / "nowhere"), EvaluationOptions(**changes))

    monkeypatch.setattr("whit.evaluation.measure.available", lambda: False)
    with pytest.raises(EvaluationError, match=r"piqa \(without its local file, --task-data DIR\).*whit\[tasks\]"):
        ask(tasks=("piqa",))
    with pytest.raises(EvaluationError, match=r"mmlu \(none of piqa.*whit\[tasks\]"):
        ask(tasks=("mmlu",), task_data=tmp_path)
    with pytest.raises(EvaluationError, match=r"holds no piqa.jsonl"):
        ask(tasks=("piqa",), task_data=tmp_path)
    with pytest.raises(EvaluationError, match="no such folder"):
        ask(tasks=("piqa",), task_data=tmp_path / "none")
    with pytest.raises(EvaluationError, match="limit 0"):
        ask(limit=0)


@pytest.mark.shared
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_real_files_are_read_whole(shared, task):
    counts = {
        "piqa": 1838, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "openbook_qa": 500,
        "copa": 100, "hellaswag": 10042, "lambada": 5153,
    }  # fmt: skip
    assert len(task.read(shared / "data", None)) == counts[task.name]


@pytest.mark.shared
@pytest.mark.slow
def test_the_real_model_knows_more_than_chance(shared, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A short text to pass the time. " * 8)
    options = EvaluationOptions(text=str(text), tasks=("arc_easy",), task_data=shared / "data", limit=40)
    got = evaluate(str(shared / "models/smollm2-135m-fp"), options)
    assert got.tasks["arc_easy"].accuracy > 0.3
