"""An output head that shares the packed matrix of the input embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whit.kernels import packed_linear
from whit.modules.packed import PackedModule, resident
from whit.modules.refusing import refusing


class TiedHead(nn.Module):
    """x (..., in_features) times a matrix that another module holds, plus its own bias."""

    bias: nn.Parameter | None

    def __init__(self, head: nn.Linear, source: nn.Module, dtype: torch.dtype) -> None:
        """`source` is packed, or will be before the first call."""
        super().__init__()
        self._source = (source,)  # in a tuple: as a submodule it would be saved twice
        self.in_features, self.out_features = head.in_features, head.out_features
        empty = torch.empty(self.out_features, 0, dtype=dtype, device=head.weight.device)
        self.register_buffer("weight", refusing(empty), persistent=False)
        self.register_parameter("bias", head.bias)
        self.train(head.training)

    @property
    def source(self) -> PackedModule:
        return self._source[0]  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        with resident(self.source) as packed:
            x = input.to(packed.device)
            if torch.compiler.is_compiling():
                return self.source.traced(x, self.bias)
            kernel, prepared = self.source.ready(x)
            return packed_linear(x, prepared, self.bias, kernel)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"
