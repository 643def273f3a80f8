"""Packed weights of random numbers."""

from __future__ import annotations

import torch
from torch import Generator

from whit import quantize_tensor
from whit.layouts import BITS
from whit.tensor import PackedWeight


def packed(spec: str, rows: int, columns: int, random: Generator) -> PackedWeight:
    return BITS.pack(quantize_tensor(torch.randn(rows, columns, generator=random), spec))
