"""Unsigned integers of k bits in a dense stream of 32-bit words, least significant bit first.

GPTQ, compressed-tensors and MLX all store codes so (compressed-tensors since 0.18; before, a word held 32 // k codes
and padding: `unpack_padded`). Rows are padded with zeros to whole words. AWQ has an order of its own in a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.layouts.stream import pack_stream, unpack_stream

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this column of eight
AWQ_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def word_count(count: int, bits: int) -> int:
    """Words that `count` integers fill."""
    return -(-count * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) to int32 (rows, ceil(n bits / 32))."""
    stream = pack_stream(straight(codes), bits, 0)
    if missing := -stream.shape[1] % 4:
        stream = torch.nn.functional.pad(stream, (0, missing))
    return straight(stream).view(torch.int32)


def unpack_words(words: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack_words`: uint8 (rows, count)."""
    stream = straight(words).view(torch.uint8)
    return unpack_stream(straight(stream[:, : -(-count * bits // 8)]), count, bits, 0)[:, :count].contiguous()


def straight(matrix: Tensor) -> Tensor:
    """Contiguous, also in the strides of dimensions of size 1, which `contiguous` leaves as they are."""
    return matrix.reshape(-1).reshape(matrix.shape)


def unpack_padded(words: Tensor, count: int, bits: int) -> Tensor:
    """Words that hold 32 // bits integers each, and padding: uint8 (rows, count)."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(words), -1)[:, :count].to(torch.uint8)


def reorder(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Columns permuted within each eight."""
    rows = codes.shape[0]
    return codes.reshape(rows, -1, 8)[:, :, list(order)].reshape(rows, -1)
