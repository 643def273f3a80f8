"""A rotation of every few neighbouring columns: x H, H the Hadamard matrix of that size, orthogonal and symmetric.

    H = H_2 x ... x H_2 / sqrt(size),   H_2 = [[1, 1], [1, -1]]   (Sylvester's; H H = 1)

What is large in one column is spread over all of its run, so that a scale that many columns share fits them better;
products stay what they were, since (x H) (w H)^T = x w^T. Sizes are powers of 4, whose 1 / sqrt(size) is a power of 2:
H is exact in every floating-point type.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SIZES = (4, 16, 64, 256)
CHUNK = 1 << 22  # elements that are turned at a time in float64


def rotate(x: Tensor, size: int) -> Tensor:
    """x (..., columns), every `size` neighbouring columns times H, in x's own type (sums in float32, or wider).

    `columns` is a multiple of `size`. Rotating twice gives x again, but for rounding.
    """
    runs = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return (runs @ hadamard(size, x.dtype, x.device)).reshape(x.shape)


def rotate_exactly(matrix: Tensor, size: int) -> Tensor:
    """`rotate` of a matrix (rows, columns), summed in float64 and rounded once: the same bits however it is cut."""
    step = max(CHUNK // max(matrix.shape[1], 1), 1)
    parts = [rotate(part.to(torch.float64), size).to(matrix.dtype) for part in torch.split(matrix, step)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@lru_cache(maxsize=64)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H (size, size)."""
    with torch.inference_mode(False):  # it is kept, and may be needed where gradients are
        found = torch.ones(1, 1, dtype=torch.float64)
        while len(found) < size:
            found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
        entries: Tensor = found / size**0.5
        return entries.to(dtype).to(device)
