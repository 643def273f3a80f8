"""Zero-shot tasks: which continuation does the model find likeliest?

    score(choice) = sum_t log p(choice_t | context, choice_<t),   divided by the choice's characters for acc_norm

Tokenisation, truncation and scoring follow lm-evaluation-harness's HFLM: context and continuation are encoded
together and split at the context's own length; too long an input loses tokens on its left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whit.errors import EvaluationError
from whit.evaluation.listener import Listener
from whit.evaluation.perplexity import called, require_finite, row_chunks
from whit.evaluation.result import TaskResult
from whit.evaluation.statistics import proportion
from whit.evaluation.tasks import Item, Task

_BATCH_TOKENS = 2048
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether each of its tokens is the model's first choice."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class _Request:
    inputs: tuple[int, ...]  # context and continuation, without the last token
    targets: tuple[int, ...]  # the continuation's tokens


def run_task(task: Task, items: Sequence[Item], scorer: Scorer, listener: Listener) -> TaskResult:
    """Score every choice of every item and count the right ones."""
    pairs = [pair for item in items for pair in item.pairs]
    scores = iter(scorer.score(pairs, task.name, listener))
    hits = [_is_right(item, [next(scores) for _ in item.pairs], task.metric) for item in items]
    accuracy, stderr = proportion(hits)
    return TaskResult(accuracy, stderr, len(items), "acc" if task.metric == "greedy" else task.metric)


def _is_right(item: Item, scores: list[Score], metric: str) -> bool:
    if metric == "greedy":
        return scores[0].greedy
    values = [score.log_likelihood for score in scores]
    if metric == "acc_norm":
        values = [value / max(1, length) for value, length in zip(values, item.lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__) == item.gold


@dataclass(frozen=True)
class Scorer:
    """Log-likelihoods of continuations under one model; inputs longer than `max_length` lose tokens on the left."""

    model: Any
    tokenizer: Any
    max_length: int | None

    def score(self, pairs: Sequence[tuple[str, str]], what: str, listener: Listener) -> list[Score]:
        """One Score for each (context, continuation); batched by length, equal inputs run once."""
        prefix = _special_prefix(self.tokenizer)
        requests = [self._request(context, continuation, prefix) for context, continuation in pairs]
        self._tell_truncated(requests, what, listener)
        limit = self.max_length
        inputs = {request: request.inputs[-limit:] if limit else request.inputs for request in requests}
        wanted: dict[tuple[int, ...], set[_Request]] = {}
        for request, kept in inputs.items():
            wanted.setdefault(kept, set()).add(request)
        found: dict[_Request, Score] = {}
        for batch in _length_batches(list(wanted)):
            logits = self._forward(batch)
            for row, kept in zip(logits, batch, strict=True):
                for request in wanted[kept]:
                    found[request] = _score(row[: len(kept)], request.targets, called(self.model))
            listener.step(what, len(found), len(inputs), sum(map(len, batch)))
        return [found[request] for request in requests]

    def _request(self, context: str, continuation: str, prefix: list[int]) -> _Request:
        spaces = len(context) - len(context.rstrip())
        if spaces:  # trailing spaces belong to the first token of the continuation
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, start = self._encode(context + continuation), len(self._encode(context))
        tokens, targets = prefix + whole, whole[start:]
        if not targets or (start == 0 and not prefix):
            raise EvaluationError(f"{continuation!r}: leaves no token to predict after its context; check the file")
        return _Request(tuple(tokens[:-1]), tuple(targets))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tell_truncated(self, requests: list[_Request], what: str, listener: Listener) -> None:
        limit = self.max_length
        if limit is None:
            return
        long = sum(len(request.inputs) > limit for request in requests)
        if any(len(request.targets) > limit for request in requests):
            raise EvaluationError(f"task {what}: a choice is longer than the model's {limit} positions; drop the task")
        if long:
            listener.note(f"task {what}: {long} of {len(requests)} inputs were cut on the left to {limit} tokens")

    def _forward(self, batch: list[tuple[int, ...]]) -> Tensor:
        """Logits [rows, longest, vocabulary]; shorter rows are padded on the right, where causality hides it."""
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        device = self.model.device
        with torch.inference_mode():
            output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        logits: Tensor = output.logits
        return logits


def _score(logits: Tensor, targets: tuple[int, ...], who: str = "the model") -> Score:
    """From logits [inputs, vocabulary], the last rows of which predict the targets."""
    wanted = torch.tensor(targets, device=logits.device)
    tail = logits[-len(targets) :]
    total, greedy = 0.0, True
    for rows in row_chunks(*tail.shape):
        log_probabilities = torch.log_softmax(tail[rows].float(), dim=-1)
        picked = log_probabilities.gather(1, wanted[rows, None]).squeeze(1)
        require_finite(picked, who)
        total += float(picked.double().sum())
        greedy = greedy and bool((log_probabilities.argmax(dim=-1) == wanted[rows]).all())
    return Score(total, greedy)


def _length_batches(inputs: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Longest first, so that a batch that does not fit shows at once; ties in token order, so runs are alike."""
    batches: list[list[tuple[int, ...]]] = []
    for row in sorted(inputs, key=lambda row: (-len(row), row)):
        current = batches[-1] if batches else None
        if current and len(current) < _BATCH_ROWS and (len(current) + 1) * len(current[0]) <= _BATCH_TOKENS:
            current.append(row)
        else:
            batches.append([row])
    return batches


def _special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (a BOS token or nothing), as the harness does; no end token."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
