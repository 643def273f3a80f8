"""Work that is shared out so that no result depends on the number of threads.

Sums inside torch's products and reductions follow the number of threads that share them, in a backward pass more than
elsewhere. On a CPU every task is therefore done whole by one thread, many of them side by side, and what they give is
added up in the order of the tasks. A GPU gets one task after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """`map` does tasks side by side, or one after the other where there is no pool."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    @property
    def share(self) -> bool:
        """Whether a batch should come in parts, one a task."""
        return self._pool is not None

    def map(self, do: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results in the order of the tasks, each as soon as it and all before it are there."""
        return map(do, tasks) if self._pool is None else self._pool.map(do, tasks)


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum in float32 with one more part, in place; None before the first."""
    return part.to(torch.float32) if total is None else total.add_(part)


@contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    """As many as torch has threads; each computes on a single one."""
    if device.type != "cpu":
        yield Workers(None)
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(before, initializer=_alone)
    try:
        torch.set_num_threads(1)
        yield Workers(pool)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # which torch has on in every new thread
