"""The matrices of a block that are quantized one by one, made fewer and faster.

Matrices below one activation have one hessian: where no param spans rows they are quantized as a single tall matrix,
and what a method makes of the hessian (GPTQ: its inverse) is made once. On a GPU the walk over the columns of a small
matrix leaves most of the device idle; there the matrices of a block are walked side by side, each on a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.methods.base import Quantizer
from whit.methods.stack import can_stack, quantize_stack
from whit.tensor import Format, LayerStats, QuantizedTensor, tensor_param

LANES = 4  # matrices that are walked side by side on a GPU: a decoder block has four inputs
LANE_ELEMENTS = 1 << 24  # of the larger of a matrix and its hessian; beyond, one fills a GPU, and memory is dear


@dataclass(frozen=True)
class Work:
    """A matrix (out, in), what calibration saw of its input, and the format that it is to have."""

    name: str
    weight: Tensor
    stats: tuple[LayerStats, ...]
    format: Format


class Together:
    """Quantizes the matrices of a block as they are asked for, each with those that it is best done with."""

    def __init__(self, method: Quantizer, works: Sequence[Work]) -> None:
        self._method = method
        self._groups = _groups(works)
        self._lanes = lanes_for(works)
        self._done: dict[str, QuantizedTensor] = {}

    def take(self, name: str) -> QuantizedTensor:
        """What `quantize_stack` makes of a matrix; may be asked for once."""
        if name not in self._done:
            self._quantize(self._groups if self._lanes else [g for g in self._groups if name in {w.name for w in g}])
        return self._done.pop(name)

    def _quantize(self, groups: Sequence[Sequence[Work]]) -> None:
        groups = sorted(groups, key=lambda group: -group[0].weight.shape[1])  # the longest walk begins first
        for stream in self._lanes:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        for turn, group in enumerate(groups):
            with torch.cuda.stream(self._lanes[turn % LANES]) if self._lanes else nullcontext():
                self._done |= _quantize(self._method, group)
        for stream in self._lanes:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


def _groups(works: Sequence[Work]) -> list[list[Work]]:
    """Those that can be one tall matrix lie in one list."""
    found: dict[tuple[object, ...], list[Work]] = {}
    for work in works:
        alone = len(work.stats) > 1 or not can_stack(work.format)
        # The same values, not only equal ones: what shares an input was given the same statistics.
        key = work.name if alone else id(work.stats[0].hessian)
        found.setdefault((key, work.format), []).append(work)
    return list(found.values())


def _quantize(method: Quantizer, group: Sequence[Work]) -> dict[str, QuantizedTensor]:
    first = group[0]
    if len(group) == 1:
        return {first.name: quantize_stack(method, first.weight, first.stats, first.format)}
    whole = method(torch.cat([work.weight for work in group]), first.stats[0], first.format)
    sizes = [len(work.weight) for work in group]
    codes = _rows_of(whole.codes, sizes)
    params = {name: tensor_param(whole.params, name) for name in whole.params}
    parts = {name: _rows_of(value, sizes) for name, value in params.items()}
    return {
        work.name: QuantizedTensor(
            work.format, tuple(work.weight.shape), codes[i], {name: part[i] for name, part in parts.items()}
        )
        for i, work in enumerate(group)
    }


def _rows_of(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of each matrix; memory of their own, so that the tall one can go."""
    return [part.clone() for part in torch.split(values, list(sizes))]


def lanes_for(works: Sequence[Work]) -> tuple[torch.cuda.Stream, ...]:
    """Streams for the matrices of a block; none on a CPU, and none where a matrix fills a GPU."""
    largest = max((max(work.weight.numel(), work.weight.shape[1] ** 2) for work in works), default=0)
    if not works or largest > LANE_ELEMENTS or not all(work.weight.is_cuda for work in works):
        return ()
    return streams(works[0].weight.device)


@lru_cache(maxsize=8)
def streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """The lanes of a device, made once: recorded walks belong to the lane that they were recorded for."""
    return tuple(torch.cuda.Stream(device) for _ in range(LANES))  # type: ignore[no-untyped-call]
