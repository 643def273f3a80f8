"""Integers in blocks that share a scale, as libraries of tensor subclasses hold them: w = (code - zero_point) scale.

Rows in groups of columns, whole rows and whole tensors are formats of whit, as they are; other blocks are dequantized.
So is what has an offset instead, w = (code - middle) scale + offset: it is whit's `-offset`, w = code scale + M, where
M = offset - middle scale is a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed
from whit.formats.affine import Affine
from whit.formats.offset import Offset
from whit.layouts.affine import middle
from whit.tensor import QuantizedTensor

NOTE = "blocks that are not groups of a row's columns, or zero points that are not codes"
OFFSET_NOTE = "offsets that float32 does not hold as whit counts them"


@dataclass(frozen=True)
class Blocks:
    """What a tensor of codes is: `shape` in blocks of `block`, codes of `bits` from `low` on; `keys` in the file."""

    where: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    block: tuple[int, ...]
    bits: int
    low: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks along each dimension; CheckpointError where they do not divide."""
        sizes, block = self.shape, self.block
        if len(block) != len(sizes) or not sizes or min(*block, *sizes) < 1 or any(map(int.__mod__, sizes, block)):
            raise CheckpointError(
                f"{self.where}: {list(sizes)} in blocks of {list(block)}; they must divide; get the file again"
            )
        return tuple(map(int.__floordiv__, sizes, block))

    @property
    def group_size(self) -> int | None:
        """Columns that share params, 0 for a row or the whole tensor; None where blocks are something else."""
        if prod(self.counts) == 1 or (self.block[-1] == self.shape[-1] and prod(self.block[:-1]) == 1):
            return 0
        return self.block[-1] if prod(self.block[:-1]) == 1 else None

    def of_rows(self, values: Tensor) -> Tensor:
        """One param for each block, in the order of the blocks, as (rows, groups), or (1, 1) of a tensor."""
        if values.numel() != prod(self.counts):
            raise CheckpointError(
                f"{self.where}: {values.numel()} scales or zero points for {prod(self.counts)} blocks; there must be "
                "one for each; get the file again"
            )
        return values.reshape(-1, self.counts[-1])

    def spread(self, values: Tensor) -> Tensor:
        """One float for each block to one for each code, in `shape`."""
        values = self.of_rows(values).to(torch.float32).reshape(self.counts)
        for dimension, step in enumerate(self.block):
            values = values.repeat_interleave(step, dim=dimension) if step > 1 else values
        return values

    def checked(self, codes: Tensor) -> Tensor:
        """The codes, or CheckpointError where one is out of range."""
        least, most = (int(end) for end in torch.aminmax(codes))
        if least < self.low or most >= self.low + (1 << self.bits):
            raise CheckpointError(
                f"{self.keys[0]}: codes from {least} to {most}, and those of {self.bits} bits begin at {self.low}; get "
                "the file again"
            )
        return codes


def affine_blocks(said: Blocks, scale: Tensor, zero: Tensor | None, read: Callable[[], Tensor]) -> Packed:
    """Codes that `read` gives in `shape`, with a scale and, in the same count as the codes, a zero point per block."""
    kind = SCALE_TYPES.get(scale.dtype)
    scale, zero = said.of_rows(scale), said.of_rows(zero) if zero is not None and bool(zero.any()) else None
    if kind is None or not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{said.where}: scales that are not finite floats; all must be; get the file again")
    codes: Callable[[], Tensor] = lambda: said.checked(read())  # noqa: E731
    most = said.low + (1 << said.bits)
    whole = zero is None or bool(((zero == zero.round()) & (zero >= said.low) & (zero < most)).all())
    if said.group_size is None or not whole or said.low not in (0, -middle(said.bits)):

        def floats() -> Tensor:
            steps = codes().to(torch.float32)
            return (steps if zero is None else steps - said.spread(zero)) * said.spread(scale)

        return Packed(said.keys, said.shape, None, floats, NOTE)
    symmetric = zero is None and said.low < 0 and said.bits > 1
    rows = prod(said.shape[:-1])
    format = Affine(said.bits, said.group_size, symmetric, scale.numel() == 1 and rows > 1, scale_type=kind)

    def value() -> QuantizedTensor:
        found = codes().reshape(rows, -1)
        if symmetric:
            return QuantizedTensor(format, said.shape, found.to(torch.int8), {"scale": scale})
        first = torch.zeros_like(scale, dtype=torch.float32) if zero is None else zero
        params = {"scale": scale, "zero_point": (first.to(torch.int16) - said.low).to(torch.uint8)}
        return QuantizedTensor(format, said.shape, (found.to(torch.int16) - said.low).to(torch.uint8), params)

    return Packed(said.keys, said.shape, format, value)


def offset_groups(said: Blocks, scale: Tensor, offset: Tensor, read: Callable[[], Tensor]) -> Packed:
    """Unsigned codes with an offset per group: w = (code - middle) scale + offset; the last group may be shorter.

    `scale`, `offset` (rows, groups); `block` is one row's group, which need not divide the row.
    """
    half, size, rows = middle(said.bits), said.block[-1], prod(said.shape[:-1])
    if not bool((torch.isfinite(scale) & torch.isfinite(offset)).all()):
        raise CheckpointError(f"{said.where}: scales that are not finite floats; all must be; get the file again")
    size = 0 if size == said.shape[-1] else size
    codes: Callable[[], Tensor] = lambda: said.checked(read()).reshape(rows, -1)  # noqa: E731
    if not bool(offset.any()):
        format = Affine(said.bits, size, scale_type=SCALE_TYPES[scale.dtype])

        def signed() -> QuantizedTensor:
            found = (codes().to(torch.int16) - half).to(torch.int8)
            return QuantizedTensor(format, said.shape, found, {"scale": scale})

        return Packed(said.keys, said.shape, format, signed)
    moved = offset.double() - half * scale.double()
    exact = Offset(said.bits, size, "f32") if torch.equal(moved.float().double(), moved) else None

    def value() -> QuantizedTensor:
        assert exact is not None
        params = {"scale": scale.float(), "offset": moved.float()}
        return QuantizedTensor(exact, said.shape, codes().to(torch.uint8), params)

    def floats() -> Tensor:
        index = torch.arange(said.shape[-1]) // (size or said.shape[-1])
        steps = codes().to(torch.float32) - half
        return (steps * scale.float()[:, index] + offset.float()[:, index]).reshape(said.shape)

    return Packed(said.keys, said.shape, exact, floats if exact is None else value, None if exact else OFFSET_NOTE)
