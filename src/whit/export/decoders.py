"""Second decoders of what whit writes, for the check after writing: numpy, from the formats' descriptions.

They share nothing with `layouts/` and are slow and plain on purpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]


def fields(words: NDArray[np.uint32], count: int, bits: int) -> NDArray[np.uint8]:
    """(n, w) words to (n, count) integers; integer j takes the bits [j b, j b + b) of the row's stream."""
    padded = np.concatenate([words, np.zeros((len(words), 1), np.uint32)], axis=1)
    out = np.empty((len(words), count), np.uint8)
    for j in range(count):
        word, shift = divmod(j * bits, 32)
        value = padded[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | (padded[:, word + 1] << np.uint32(32 - shift))
        out[:, j] = value & np.uint32((1 << bits) - 1)
    return out


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, version: int) -> Tensor:
    """s[g] (q - z[g]) with g = g_idx[k]; version 1 stores z - 1."""
    rows, columns = scales.shape[1], len(g_idx)
    codes = fields(_words(qweight.t()), columns, bits).astype(np.float32)
    zeros = fields(_words(qzeros), rows, bits).astype(np.int32) + (1 if version == 1 else 0)
    group = g_idx.numpy()
    return torch.from_numpy((codes - zeros.T[:, group]) * scales.float().numpy().T[:, group]).float()


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """s (q - z); column c of eight lies in the nibble at which (0, 2, 4, 6, 1, 3, 5, 7) says c."""

    def nibbles(words: Tensor) -> NDArray[np.float32]:
        raw = _words(words)
        out = np.empty((raw.shape[0], raw.shape[1] * 8), np.float32)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, column::8] = (raw >> np.uint32(4 * nibble)) & np.uint32(15)
        return out

    codes, zeros, scale = nibbles(qweight), nibbles(qzeros), scales.float().numpy()
    group = np.arange(len(codes)) // (len(codes) // len(scale))
    return torch.from_numpy(np.ascontiguousarray(((codes - zeros[group]) * scale[group]).T))


def bitsandbytes_4bit(weight: Tensor, absmax: Tensor, levels: Tensor, shape: tuple[int, int]) -> Tensor:
    """absmax level, high nibble first; `absmax` float32 (n / s,)."""
    raw = weight.reshape(-1).numpy()
    codes = np.empty(raw.size * 2, np.int64)
    codes[0::2], codes[1::2] = raw >> 4, raw & 15
    values = levels.numpy()[codes].reshape(absmax.numel(), -1) * absmax.reshape(-1, 1).numpy()
    return torch.from_numpy(values.reshape(shape))


def packed_integers(packed: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, int], bits: int) -> Tensor:
    """compressed-tensors: s (q - z) with q and z signed, stored plus 2^(b-1), z packed along rows."""
    rows, columns = shape
    half = 1 << (bits - 1)
    codes = fields(_words(packed), columns, bits).astype(np.float32) - half
    size = columns // scale.shape[1]
    if zero is not None:
        codes -= np.repeat(fields(_words(zero.t()), rows, bits).T.astype(np.float32) - half, size, axis=1)
    return torch.from_numpy(codes * np.repeat(scale.float().numpy(), size, axis=1))


def _words(tensor: Tensor) -> NDArray[np.uint32]:
    return tensor.contiguous().numpy().view(np.uint32)


def mlx(weight: Tensor, scales: Tensor, biases: Tensor, columns: int) -> Tensor:
    """q scale + bias; the width is what fills the words."""
    bits = 32 * weight.shape[1] // columns
    codes = fields(_words(weight.view(torch.int32)), columns, bits).astype(np.float32)
    size = columns // scales.shape[1]
    scale, bias = (np.repeat(t.float().numpy(), size, axis=1) for t in (scales, biases))
    return torch.from_numpy(codes * scale + bias)


def hqq(packed: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """(q - zero) scale, one group a row; the highest bits of W_q are the first rows. (R, s)"""
    raw = packed.numpy().astype(np.int64) & 0xFFFFFFFF
    slices = 10 if bits == 3 else 8 // bits
    shifts = range(bits * (slices - 1), -1, -bits)
    codes = np.concatenate([(raw >> shift) % (1 << bits) for shift in shifts])[: scale.numel()]
    values = (codes.astype(np.float32) - zero.float().numpy()) * scale.float().numpy()
    return torch.from_numpy(values)


def matmul_nbits(blocks: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Tensor:
    """scale (q - z): bytes (N, K / s, s b / 8) with the first code in the lowest bits; z = 2^(b-1) where not given."""

    def spread(data: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return np.stack(parts, axis=-1).reshape(*data.shape[:-1], -1).astype(np.float32)

    scale = scales.float().numpy()[..., None]
    zero: Any = 1 << (bits - 1)
    if zero_points is not None:
        zero = spread(zero_points.numpy())[:, : scale.shape[1], None]
    return torch.from_numpy((spread(blocks.numpy()) - zero) * scale).reshape(len(scale), -1)
