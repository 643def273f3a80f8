"""One call that measures a model: perplexity, divergence from a baseline, tasks, bits per weight.

Order: everything that can be refused without weights is refused first; then the baseline's pass where both models do
not fit in memory together; then the model.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.data import resolve_text
from whit.devices import find_device
from whit.errors import EvaluationError, UnsupportedModelError
from whit.evaluation.divergence import Baseline, Divergence, LiveBaseline, compare_windows
from whit.evaluation.harness import available, run_harness
from whit.evaluation.listener import Listener, Silent
from whit.evaluation.memory import available_bytes, fit_together
from whit.evaluation.perplexity import score_windows
from whit.evaluation.result import BaselineResult, EvaluationResult
from whit.evaluation.size import measure_size, weight_files
from whit.evaluation.statistics import blocks, percentile
from whit.evaluation.storage import (
    StoredBaseline,
    baseline_key,
    bytes_needed,
    is_complete,
    require_space,
    store_baseline,
)  # fmt: skip
from whit.evaluation.tasks import TASKS, Item, Task, builtin
from whit.evaluation.text import DEFAULT_CONTEXT, choose_context, cut_windows, read_text, tokenize
from whit.evaluation.zeroshot import Scorer, run_task
from whit.extras import missing
from whit.integrations.loading import load_causal_lm, load_config, load_tokenizer, maximum_context, model_files


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how.

    - `baseline`: a model to compare with, by KL divergence and agreement of the likeliest tokens.
    - `text`: a file, "whit:heldout" or "whit:text"; its first `max_tokens` tokens (None: all), in windows of `context`
      tokens (None: 2048, or the model's maximum if that is less).
    - `tasks`: names of zero-shot tasks, the first `limit` items of each; `task_data` is a folder with their files.
    - `device`: auto, cpu or cuda. `dtype`: auto (the checkpoint's), float32, bfloat16 or float16.
    - `two_pass`: keep the baseline's logits in temporary files even if both models fit into memory. `baseline_cache`:
      keep them in this folder for later runs.
    - `seed`: of the bootstrap behind the confidence interval.
    """

    baseline: str | None = None
    text: str = "whit:heldout"
    context: int | None = None
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    two_pass: bool = False
    baseline_cache: Path | None = None
    seed: int = 0


def evaluate(
    model: str, options: EvaluationOptions | None = None, listener: Listener | None = None, network: Any = None
) -> EvaluationResult:
    """Measure a model (local folder, .gguf file or hub id). Everything it refuses is a WhitError with one sentence.

    `listener` hears of progress. `network` is the model if it is loaded already, by whatever library; `model` then
    names its files.
    """
    options = options or EvaluationOptions()
    notes = _Notes(listener or Silent())
    local, foreign = _plan_tasks(options)
    config = load_config(model, trust_remote_code=options.trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        if options.tasks:
            raise UnsupportedModelError(
                f"{model}: reads one text and writes another; tasks compare continuations of one; leave --tasks out"
            )
        notes.note("the second half of every window is predicted, from the first")
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    windows = _windows(config, tokenizer, options, notes)
    if options.baseline is not None:
        _require_same_tokens(options.baseline, tokenizer, options)
    with _measured(model, windows, options, notes, network) as (network, losses, divergence):
        scorer = Scorer(network, tokenizer, maximum_context(config))
        tasks = {task.name: run_task(task, items, scorer, notes) for task, items in local}
        if foreign:
            tasks |= run_harness(network, tokenizer, foreign, options.limit, options.task_data)
    size = measure_size(model_files(model), config)
    pooled = blocks(losses)
    perplexity, error = _exp(pooled.mean, "the model"), pooled.standard_error()
    return EvaluationResult(
        model=model,
        perplexity=perplexity,
        perplexity_stderr=None if error is None else perplexity * error,
        tokens=losses.numel(),
        context=windows.shape[1],
        bits_per_weight=size.bits_per_weight,
        size_bytes=size.size_bytes,
        baseline=None if divergence is None else _summary(str(options.baseline), divergence, options.seed),
        tasks={name: tasks[name] for name in options.tasks},
        notes=tuple(notes.said),
    )


class _Notes:
    """Passes everything on and remembers the notes for the result."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.said: list[str] = []

    def step(self, what: str, done: int, total: int, tokens: int) -> None:
        self.listener.step(what, done, total, tokens)

    def note(self, sentence: str) -> None:
        self.said.append(sentence)
        self.listener.note(sentence)


def _plan_tasks(options: EvaluationOptions) -> tuple[list[tuple[Task, list[Item]]], list[str]]:
    """Built-in tasks with their items, and the names left to lm-evaluation-harness."""
    if options.limit is not None and options.limit < 1:
        raise EvaluationError(f"limit {options.limit}: a task needs at least one item; use 1 or more")
    if options.task_data is not None and not options.task_data.is_dir():
        raise EvaluationError(f"{options.task_data}: no such folder; --task-data must hold the tasks' files; check it")
    local, foreign = [], []
    for name in options.tasks:
        task = builtin(name)
        if task is not None and options.task_data is not None:
            local.append((task, task.read(options.task_data, options.limit)))
        elif not available():
            known = ", ".join(task.name for task in TASKS)
            reason = "without its local file, --task-data DIR" if task else f"none of {known}"
            raise EvaluationError(missing("tasks", f"task {name} ({reason})"))
        else:
            foreign.append(name)
    return local, foreign


def _windows(config: Any, tokenizer: Any, options: EvaluationOptions, notes: _Notes) -> Tensor:
    maximum = maximum_context(config)
    context = choose_context(options.context, maximum)
    if options.context is None and context < DEFAULT_CONTEXT:
        notes.note(f"context {context}: the most that the model was built for; --context sets another")
    text = read_text(resolve_text(options.text), tokenizer)
    tokens = tokenize(text, tokenizer, options.max_tokens, options.text)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise EvaluationError(
            f"tokenizer: gives token {int(tokens.max())} and the model's vocabulary ends at {vocabulary - 1}; "
            "they must belong together; check the model folder"
        )
    return cut_windows(tokens, context)


def _require_same_tokens(baseline: str, tokenizer: Any, options: EvaluationOptions) -> None:
    """Distributions over different tokens cannot be compared; the sample holds every kind of character."""
    other = load_tokenizer(baseline, trust_remote_code=options.trust_remote_code)
    sample = read_text(resolve_text(options.text), tokenizer)[:20_000]
    if not torch.equal(*(tokenize(sample, each, None, options.text) for each in (tokenizer, other))):
        raise EvaluationError(
            f"{baseline}: its tokenizer cuts the text into other tokens than the model's; "
            "the two must be equal; name the model that this one was made from"
        )


@contextmanager
def _measured(
    model: str, windows: Tensor, options: EvaluationOptions, notes: _Notes, network: Any = None
) -> Iterator[tuple[Any, Tensor, Divergence | None]]:
    """The loaded model with its losses and, where there is a baseline, the divergence."""
    if options.baseline is None:
        network = network or _load(model, options)
        yield network, score_windows(network, windows, notes), None
        return
    with _baseline(model, windows, options, notes, network) as (baseline, network):
        divergence = compare_windows(network, baseline, windows, notes)
    del baseline
    _release()
    yield network, divergence.losses, divergence


@contextmanager
def _baseline(
    model: str, windows: Tensor, options: EvaluationOptions, notes: _Notes, network: Any = None
) -> Iterator[tuple[Baseline, Any]]:
    """The baseline's logits, live or stored, and the loaded model."""
    name = str(options.baseline)
    cache = options.baseline_cache
    if cache is None and not options.two_pass:
        sizes = [sum(f.stat().st_size for f in weight_files(model_files(each))) for each in (model, name)]
        if fit_together(sizes, available_bytes(options.device)):
            yield LiveBaseline(_load(name, options)), network or _load(model, options)
            return
        notes.note("baseline: the two models do not fit in memory together; its logits go through temporary files")
    with tempfile.TemporaryDirectory(prefix="whit-baseline-") as temporary:
        place = Path(temporary) if cache is None else cache
        key = baseline_key(model_files(name), windows, options.dtype, options.device)
        folder = place / key
        folder.mkdir(parents=True, exist_ok=True)
        on_gpu = find_device(options.device).type == "cuda"
        if is_complete(folder, windows, on_gpu):
            notes.note(f"baseline: its logits are read from {folder}")
        else:
            _store(name, windows, folder, options, notes)
        yield StoredBaseline(folder, name), network or _load(model, options)


def _store(name: str, windows: Tensor, folder: Path, options: EvaluationOptions, notes: _Notes) -> None:
    network = _load(name, options)
    vocabulary = network.config.get_text_config().vocab_size
    needed = bytes_needed(windows, vocabulary, network.dtype.itemsize)
    notes.note(f"baseline: its logits take {needed / 1e9:.2f} GB in {folder.parent}")
    require_space(folder, needed - sum(file.stat().st_size for file in folder.iterdir()))
    store_baseline(network, windows, folder, notes)
    del network
    _release()


def _load(name: str, options: EvaluationOptions) -> Any:
    return load_causal_lm(
        name, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code, two_texts=True
    )


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _summary(name: str, divergence: Divergence, seed: int) -> BaselineResult:
    kl = blocks(divergence.kl)
    return BaselineResult(
        name=name,
        perplexity=_exp(blocks(divergence.baseline_losses).mean, "the baseline"),
        kl_mean=kl.mean,
        kl_ci95=kl.interval(seed),
        kl_p99=percentile(divergence.kl, 99.0),
        top1_agreement=float(divergence.agreement.double().mean()),
    )


def _exp(mean_loss: float, who: str) -> float:
    """Perplexity from the mean loss; beyond a double's range the model is broken, and JSON has no infinity."""
    if mean_loss > math.log(torch.finfo(torch.float64).max):
        raise EvaluationError(f"{who}: its mean loss is {mean_loss:.0f} nats; perplexity overflows; check the weights")
    return math.exp(mean_loss)
