"""Runs that are stopped and go on, for tests of what they end with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def stop_after_a_block(unit: str, done: int, total: int) -> None:
    """A `progress` that ends a run as Ctrl-C does, once the first block is done."""
    if unit.endswith(".0"):
        raise KeyboardInterrupt


def stop_and_go_on(run: Callable[..., object], threads: tuple[int, int] | None = None) -> None:
    """`run(progress=...)` up to the first block, then `run()` to the end; before and after with so many threads."""
    own = torch.get_num_threads()
    first, second = threads or (own, own)
    try:
        torch.set_num_threads(first)
        with pytest.raises(KeyboardInterrupt):
            run(progress=stop_after_a_block)
        torch.set_num_threads(second)
        run()
    finally:
        torch.set_num_threads(own)
