"""Blocks in a row inside a module that runs on tokens: what enters the first, what each is given beside hidden states,
and what leaves the module behind the last.

A decoder's blocks are given what the encoder made of the sample, too (its memory). What they say of their other
arguments (rotary embeddings, masks, biases of positions) is noted once: all samples have the same length.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from whit.calibration.stubs import Stop, hidden_of, replaced, split, until_stopped
from whit.errors import UnsupportedModelError

UNKNOWN = object()  # what a block gives beside hidden states: attention weights, mostly, which nobody asks for
MEMORY = object()  # in a noted call, the sample's memory


class Stack:
    """`blocks` of `base`, which the model called `model` runs. Tokens are int64 (n, context), on the device; memory is
    (n, context of the encoder, hidden)."""

    def __init__(self, model: str, base: nn.Module, blocks: tuple[nn.Module, ...]) -> None:
        self._model, self.base, self.blocks = model, base, blocks
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._beside: tuple[Any, ...] | None = None

    def note(self, row: Tensor, memory: Tensor | None, first: AbstractContextManager[Any]) -> None:
        """The arguments of every block beside the hidden states, for one sample; all of `base` but the blocks must be
        loaded, and `first` loads the first block."""
        with first:
            self._beside = self._given_beside(row, memory)
        calls = self._noted(row, memory)
        if len(calls) != len(self.blocks):
            raise UnsupportedModelError(
                f"{self._model}: only {len(calls)} of {len(self.blocks)} blocks run on a text; "
                "calibration needs all in turn; choose a method that needs no data, such as hqq"
            )
        if memory is not None and not all(MEMORY in pytree.tree_leaves(call) for call in calls):
            raise UnsupportedModelError(
                f"{self._model}: blocks of the decoder read something else than the encoder's output; calibration "
                "hands on only that; choose a method that needs no data, such as hqq"
            )
        other = self._noted(row.flip(1), memory)
        same = map(_same, pytree.tree_leaves(calls), pytree.tree_leaves(other))
        if getattr(getattr(self.base, "config", None), "num_kv_shared_layers", 0) or not all(same):
            raise UnsupportedModelError(
                f"{type(self.blocks[0]).__name__}: is given more of a text than hidden states (its embeddings again, "
                "or an earlier block's keys and values); calibration hands on only those; choose a method that needs "
                "no data, such as hqq"
            )
        self._calls = calls

    def first_input(self, rows: Tensor, memory: Tensor | None = None) -> Tensor:
        """What the first block is given (n, context, hidden)."""
        return split(*self._first_call(rows, memory))[0]

    def forward(self, index: int, hidden: Tensor, memory: Tensor | None) -> Tensor:
        """A loaded block's outputs (n, context, hidden) for inputs of that shape."""
        args, kwargs = pytree.tree_map(lambda part: memory if part is MEMORY else part, self._calls[index])
        return hidden_of(self.blocks[index](hidden, *args, **kwargs))

    def handed_on(self, hidden: Tensor) -> Any:
        """Hidden states as the module expects them of a block."""
        return hidden if self._beside is None else (hidden, *self._beside)

    def behind(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """What the module, loaded but for its blocks, gives where `hidden` leaves the last one."""
        with replaced(self.blocks, lambda *args, **kwargs: self.handed_on(hidden)):
            found: Tensor = self.base(input_ids=rows)[0]
        return found

    def _first_call(self, rows: Tensor, memory: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            found.append((args, kwargs))
            raise Stop

        with replaced(self.blocks[:1], note):
            until_stopped(self.base, rows, memory)
        return found[0]

    def _given_beside(self, row: Tensor, memory: Tensor | None) -> tuple[Any, ...] | None:
        """What a block returns behind its hidden states; None where it is no tuple.

        Values that depend on the tokens are UNKNOWN; what is the same for other ones (T5's biases of positions, which
        its first block makes for all) is what every sample has.
        """
        outputs = []
        for turned in (False, True):
            some = None if memory is None else memory.flip(1) if turned else memory
            args, kwargs = self._first_call(row.flip(1) if turned else row, some)
            outputs.append(self.blocks[0](*args, **kwargs))
        first, second = outputs
        if not isinstance(first, tuple):
            return None
        return tuple(one if _equal(one, other) else UNKNOWN for one, other in zip(first[1:], second[1:], strict=True))

    def _noted(self, row: Tensor, memory: Tensor | None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the blocks are given beside hidden states, for one sample."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = split(args, kwargs)
            calls.append(pytree.tree_map(lambda part: MEMORY if part is memory is not None else part, (args, kwargs)))
            if len(calls) == len(self.blocks):
                raise Stop
            return self.handed_on(hidden)

        with replaced(self.blocks, note):
            self._run_noted(row, memory, calls)
        return calls

    def _run_noted(self, row: Tensor, memory: Tensor | None, calls: list[Any]) -> None:
        """Run the module over blocks that note their calls; UnsupportedModelError where one needs what another gave
        beside hidden states."""
        failed = False
        try:
            until_stopped(self.base, row, memory)
        except Exception:  # the model's own code, at what is not there
            failed = bool(self._beside)
            if not failed:
                raise
        if failed or any(part is UNKNOWN for part in pytree.tree_leaves(calls)):
            raise UnsupportedModelError(
                f"{type(self.blocks[0]).__name__}: hands more than hidden states to the next block; "
                "calibration carries only those; choose a method that needs no data, such as hqq"
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two runs were given the same, as far as can be told: what is no tensor does not hang on the tokens."""
    return not isinstance(one, Tensor) or not isinstance(other, Tensor) or torch.equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is None and other is None
