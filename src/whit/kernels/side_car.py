"""A weight with a low-rank side-car: another kernel's product with the codes, and two thin ones beside it.

x (W + B A)^T = x W^T + (x A^T) B^T: r (in + out) products more per token, in the activations' type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.lowrank import A, B, split
from whit.kernels.base import Kernel
from whit.tensor import PackedWeight


@dataclass(frozen=True)
class Pair(PackedWeight):
    """A packed weight and, prepared by the kernel for the codes, the same without its factors."""

    codes: PackedWeight


@dataclass(frozen=True)
class SideCar:
    """What `kernel` multiplies, and a side-car beside it."""

    kernel: Kernel

    @property
    def name(self) -> str:
        return f"{self.kernel.name}+side-car"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        parts = split(packed)
        return "there is no side-car" if parts is None else self.kernel.supports(parts[0], x)

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if isinstance(packed, Pair):
            return packed
        parts = split(packed)
        assert parts is not None
        codes = self.kernel.prepare(parts[0])
        tensors = {**codes.tensors, B: parts[1], A: parts[2]}
        return Pair(codes.layout, packed.format, packed.shape, tensors, codes=codes)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        parts = split(packed)
        assert parts is not None
        codes = packed.codes if isinstance(packed, Pair) else parts[0]
        b, a = parts[1].to(x.dtype), parts[2].to(x.dtype)
        beside = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
        return self.kernel.linear(x, codes, bias) + beside
