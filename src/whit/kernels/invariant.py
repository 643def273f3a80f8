"""Products in which a row's result is the same bits whatever rows are beside it: a batch-invariant mode.

A kernel that sums by rows alone takes them all; of every other one each row, or as many as it is invariant for, is a
call of its own. What a row is then depends on nothing but itself, and so it does on every device and in every format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.base import Kernel
from whit.tensor import PackedWeight


@dataclass(frozen=True)
class RowByRow:
    """`kernel`, called for `together` rows at a time: 1, or as many as do not change each other's bits."""

    kernel: Kernel
    together: int = 1

    @property
    def name(self) -> str:
        return f"{self.kernel.name}-rows"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        how = packed.activations
        if how is not None and (how.threshold > 0 or (how.kind == "dynamic" and how.granularity == "tensor")):
            return f"activations {how} are rounded by what all rows hold together"
        return self.kernel.supports(packed, x.reshape(-1, packed.shape[1])[:1])

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        return self.kernel.prepare(packed)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, packed.shape[1])
        y = torch.empty(len(rows), packed.shape[0], dtype=x.dtype, device=x.device)
        for first in range(0, len(rows), self.together):
            some = rows[first : first + self.together]
            # where a row begins in memory may change how torch sums it; a fresh tensor begins where all do
            y[first : first + self.together] = self.kernel.linear(some.clone(), packed, bias)
        return y.reshape(*x.shape[:-1], packed.shape[0])
