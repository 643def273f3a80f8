"""One token at a time in memory that never moves: a static cache, the step's inputs beside it, the step captured.

A step reads its inputs from tensors of fixed addresses and writes its logits to one, and nothing in it depends on the
host. So on a GPU it is one CUDA graph: all launches of a token in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import StaticCache

from whit.kernels.gpu import decoding
from whit.kernels.gpu.kernel import why_not as no_kernels

Replay: TypeAlias = Callable[[], object]
Capture: TypeAlias = Callable[[Replay], Replay]


class State:
    """What a step reads and writes, for `batch` sequences of at most `length` tokens.

    `tokens` and `positions` (batch, 1) int64, `mask` (batch, length) bool: which places of the cache hold tokens that
    may be seen; those that are still to come may, padding may not. `slot` (1,) int64: the place of the next token.
    `logits` (batch, vocabulary) of the last step, in the model's type.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        device, config = model.device, model.config.get_text_config()
        self.batch, self.length = batch, length
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, config.vocab_size, dtype=model.dtype, device=device)
        self.cache = StaticCache(config=config, max_cache_len=length)

    def fits(self, batch: int, length: int) -> bool:
        return batch == self.batch and length <= self.length

    def clear(self) -> None:
        """Forget the tokens; what the cache held stays in memory and is masked until it is overwritten."""
        self.slot.zero_()
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()


class Step(Protocol):
    """Computes `state.logits` for `state.tokens` and puts their keys and values into the cache at `state.slot`."""

    def __call__(self, state: State) -> None: ...


class PlainStep:
    """The model's own forward."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, state: State) -> None:
        inputs = {"input_ids": state.tokens, "position_ids": state.positions, "attention_mask": state.mask}
        found = self.model(**inputs, past_key_values=state.cache, use_cache=True, return_dict=True)
        state.logits.copy_(found.logits[:, -1])


def captured_on_cuda(work: Replay) -> Replay:
    """`work` as a CUDA graph; it must have run before, so that nothing is built or loaded while it is captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def uncaptured(work: Replay) -> Replay:
    """`work` itself."""
    return work


class Decoder:
    """A state, its prefill, and its step and greedy choice as they were captured, alone and as one (`follow`).

    `chosen` (batch, length) int64 collects what `greedy` chooses, one column per call; where a sequence has ended
    (`ended`, (batch,) bool) that is `padding`.
    """

    def __init__(self, model: Any, state: State, step: Step, capture: Capture) -> None:
        self.model, self.state, self._step = model, state, step
        device = state.tokens.device
        self.chosen = torch.zeros(state.batch, state.length, dtype=torch.int64, device=device)
        self.column = torch.zeros(state.batch, dtype=torch.int64, device=device)
        self.ended = torch.zeros(state.batch, dtype=torch.bool, device=device)
        self.stops = torch.full((8,), -1, dtype=torch.int64, device=device)
        self.padding = torch.zeros(1, dtype=torch.int64, device=device)
        self._in_one_launch = no_kernels(device) is None and decoding.choose_takes(state.logits)
        self._warm_up()
        self.step: Replay = capture(self._advance)
        self.choose: Replay = capture(self._choose)
        self.follow: Replay = capture(self._follow)

    def _warm_up(self) -> None:
        state = self.state
        self.prefill(torch.zeros_like(state.tokens), None, None)
        for _ in range(2):
            self._follow()
        if state.tokens.is_cuda:
            torch.cuda.synchronize(state.tokens.device)

    def prefill(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        """The prompt's pass: tokens (batch, n); mask (batch, n) is 0 for padding. Leaves the logits after it."""
        state, count = self.state, tokens.shape[1]
        state.clear()
        state.mask.fill_(True)
        if mask is not None:
            state.mask[:, :count] = mask != 0
        if positions is None:
            positions = (state.mask[:, :count].cumsum(-1) - 1).clamp(min=0)
        seen = None if mask is None else mask
        inputs = {"input_ids": tokens, "attention_mask": seen, "position_ids": positions}
        found = self.model(**inputs, past_key_values=state.cache, use_cache=True, return_dict=True, logits_to_keep=1)
        state.logits.copy_(found.logits[:, -1])
        state.positions.copy_(positions[:, -1:])
        state.slot.fill_(count)
        self.column.zero_()
        self.ended.zero_()

    def _advance(self) -> None:
        self.state.positions.add_(1)
        self._step(self.state)
        self.state.slot.add_(1)

    def _follow(self) -> None:
        self._advance()
        self._choose()

    def _choose(self) -> None:
        """The likeliest token of each sequence becomes the next step's input and a column of `chosen`."""
        if self._in_one_launch:
            ends, to = (self.stops, self.padding, self.ended), (self.chosen, self.column, self.state.tokens)
            return decoding.choose(self.state.logits, ends, to)
        best = self.state.logits.float().argmax(-1)
        best = torch.where(self.ended, self.padding, best)
        self.ended |= (best[:, None] == self.stops).any(-1)
        self.chosen.index_copy_(1, self.column[:1], best[:, None])
        self.column.add_(1)
        self.state.tokens.copy_(best[:, None])


def static_layers(config: Any) -> Mapping[int, str]:
    """Layers whose cache is not a plain static one, and what it is instead."""
    cache = StaticCache(config=config, max_cache_len=8)
    plain = "StaticLayer"
    return {i: type(layer).__name__ for i, layer in enumerate(cache.layers) if type(layer).__name__ != plain}
