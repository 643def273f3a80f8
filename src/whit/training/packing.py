"""Which examples a step sees, all known before the first step: a pure function of lengths, settings and seed.

Examples are packed into rows of at most `context` tokens, first fit in a shuffled order. Within a row each example
counts its positions from 0, and no attention mask is given: transformers makes the attention block-diagonal where
positions begin again (`masking_utils.find_packed_sequence_indices`). What pads a row is such a block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import torch
from torch import Tensor

from whit.training.data import Example

OPEN_ROWS = 64  # rows that an example may still be put into: packing stays linear in the number of examples
MULTIPLE = 8  # rows are padded to a multiple: tensor cores
Row = tuple[int, ...]
MicroBatch = tuple[Row, ...]
Step = tuple[MicroBatch, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with their positions (rows, length), and what is to be predicted.

    Where each row is one example there are no positions: they count from 0, and nothing has to be kept apart.
    `kept` (n,) are the places, in the flattened rows, whose next token counts; `targets` (n,) are these tokens.
    """

    tokens: Tensor
    positions: Tensor | None
    kept: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device, without waiting for it."""

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        positions = None if self.positions is None else move(self.positions)
        return Batch(move(self.tokens), positions, move(self.kept), move(self.targets))


def derive(seed: int, *parts: object) -> int:
    """A seed of its own for each purpose and number."""
    text = "/".join(map(str, (seed, *parts))).encode()
    return int.from_bytes(sha256(text).digest()[:8], "little") >> 1


def pack(order: Sequence[int], lengths: Sequence[int], context: int) -> list[Row]:
    """Rows of examples whose lengths sum to at most `context`; each into the first open row that takes it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        first = max(len(rows) - OPEN_ROWS, 0)
        place = next((i for i in range(first, len(rows)) if room[i] >= lengths[index]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(context)
        rows[place].append(index)
        room[place] -= lengths[index]
    return [tuple(row) for row in rows]


@dataclass(frozen=True)
class Portion:
    """How rows become steps: `batch` rows a micro-batch, `accumulate` micro-batches a step.

    Either `epochs` over the data, or `steps` (which counts where it is given). `packing` off: an example is a row.
    """

    context: int
    batch: int
    accumulate: int
    epochs: float = 1.0
    steps: int | None = None
    packing: bool = True


def plan_steps(lengths: Sequence[int], portion: Portion, seed: int) -> tuple[Step, ...]:
    """Every step of a run. The last one of a run over epochs may have fewer rows."""
    wanted = None if portion.steps is None else portion.steps * portion.batch * portion.accumulate
    rows: list[Row] = []
    epoch = 0
    while (len(rows) < wanted) if wanted is not None else (epoch < portion.epochs):
        new = _epoch(lengths, portion, derive(seed, "order", epoch))
        share = 1.0 if wanted is not None else min(portion.epochs - epoch, 1.0)
        rows += new[: max(round(len(new) * share), 1)]
        epoch += 1
    return _cut(_cut(rows[:wanted], portion.batch), portion.accumulate)


def plan_evaluation(lengths: Sequence[int], portion: Portion) -> tuple[MicroBatch, ...]:
    """Every example once, in order."""
    order = range(len(lengths))
    rows = pack(order, lengths, portion.context) if portion.packing else [(i,) for i in order]
    return _cut(rows, portion.batch)


def _epoch(lengths: Sequence[int], portion: Portion, seed: int) -> list[Row]:
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    return pack(order, lengths, portion.context) if portion.packing else [(i,) for i in order]


def _cut(items: Sequence[T], size: int) -> tuple[tuple[T, ...], ...]:
    return tuple(tuple(items[i : i + size]) for i in range(0, len(items), size))


def collate(rows: MicroBatch, examples: Sequence[Example], pad: int) -> Batch:
    """The tensors of a micro-batch. The last token of an example predicts nothing, nor does what pads."""
    longest = max(sum(len(examples[i].tokens) for i in row) for row in rows)
    width = -(-longest // MULTIPLE) * MULTIPLE
    tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    kept, targets = [], []
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            example = examples[index]
            end = at + len(example.tokens)
            tokens[number, at:end] = example.tokens
            positions[number, at:end] = torch.arange(end - at)
            kept.append(number * width + at + example.trained[1:].nonzero().flatten())
            targets.append(example.tokens[1:][example.trained[1:]])
            at = end
        positions[number, at:] = torch.arange(width - at)
    apart = any(len(row) > 1 for row in rows)  # else what comes before is all that a token sees
    return Batch(tokens, positions if apart else None, torch.cat(kept), torch.cat(targets))
