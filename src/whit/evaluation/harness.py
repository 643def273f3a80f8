"""Tasks in lm-evaluation-harness's own format, where that library is there.

Any task name that whit does not read from local files goes to the harness's `simple_evaluate` with our model in its
HFLM; a folder given by --task-data may hold task definitions (YAML) of the user's own.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from whit.errors import EvaluationError
from whit.evaluation.result import TaskResult
from whit.evaluation.tasks import builtin
from whit.extras import missing
from whit.randomness import callers_randomness

_ACCURACIES = ("acc_norm", "acc", "exact_match", "acc_bytes", "mc2")


def available() -> bool:
    """Whether lm-evaluation-harness can be imported."""
    return find_spec("lm_eval") is not None


def run_harness(
    model: Any, tokenizer: Any, names: Sequence[str], limit: int | None, task_data: Path | None
) -> dict[str, TaskResult]:
    """Zero-shot results by the names asked for. Raises EvaluationError for an unknown task or one without accuracy."""
    if not available():
        raise EvaluationError(missing("tasks", f"task {names[0]}"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_data) if task_data else None)
    asked = {name: _harness_name(name) for name in names}
    for name, known in asked.items():
        _require_known(name, known, manager.all_tasks)
    try:
        with _callers_generators():
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8),
                tasks=list(asked.values()),
                num_fewshot=0,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,  # 0 would leave out the standard error too
                log_samples=False,
            )
    except Exception as error:  # the harness and its data sets raise of every kind
        said = str(error).strip().split("\n")[0][:200]
        raise EvaluationError(f"tasks {', '.join(names)}: the harness stopped ({said}); see its task") from error
    return {name: _result(name, known, found) for name, known in asked.items()}


def _harness_name(name: str) -> str:
    task = builtin(name)
    return task.harness_name if task else name


def _require_known(name: str, known: str, tasks: Sequence[str]) -> None:
    if known not in tasks:
        near = difflib.get_close_matches(known, tasks, n=1)
        hint = f"the nearest is {near[0]}" if near else "see lm_eval ls tasks"
        raise EvaluationError(f"task {name}: unknown to lm-evaluation-harness; it must be one of its tasks; {hint}")


def _result(name: str, known: str, found: dict[str, Any]) -> TaskResult:
    """acc_norm where the task has it, else acc, else exact match: all are shares of items."""
    figures = found["results"].get(known, {})
    for metric in _ACCURACIES:
        for key, value in figures.items():
            if key.split(",")[0] == metric and isinstance(value, int | float):
                stderr = figures.get(key.replace(metric, f"{metric}_stderr", 1))
                count = found.get("n-samples", {}).get(known, {}).get("effective", figures.get("sample_len", 0))
                return TaskResult(float(value), stderr if isinstance(stderr, float) else None, int(count), metric)
    have = ", ".join(sorted({key.split(",")[0] for key in figures} - {"alias"})) or "nothing"
    raise EvaluationError(f"task {name}: reports {have}; whit shows accuracies; name a task that has one")


@contextmanager
def _callers_generators() -> Iterator[None]:
    """The harness seeds random, numpy and torch; the caller gets them back as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with callers_randomness():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
