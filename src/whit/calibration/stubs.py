"""Blocks of a model whose `forward` is another one for a while: what it is given is noted, or its work left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Stop(Exception):
    """Raised by a stub: what comes after the blocks is not needed."""


def split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, and the other arguments of a block."""
    if args:
        return args[0], args[1:], dict(kwargs)
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def replaced(blocks: tuple[nn.Module, ...], forward: Callable[..., Any]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def until_stopped(base: nn.Module, rows: Tensor, memory: Tensor | None = None) -> None:
    """Run a module on tokens, and on what an encoder made of others where there is such a memory."""
    try:
        base(input_ids=rows) if memory is None else base(input_ids=rows, encoder_hidden_states=memory)
    except Stop:
        return
