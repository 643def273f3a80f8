"""A linear whose weight is packed: x (..., in_features) -> x W^T + b, through the kernels' dispatch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from whit.activations import Activations
from whit.kernels import packed_linear
from whit.layouts import BITS
from whit.modules.packed import PackedModule
from whit.tensor import PackedWeight, QuantizedTensor


class QuantizedLinear(PackedModule, nn.Linear):
    """Stands for nn.Linear, and for GPT-2's Conv1D, whose weight is held transposed to (out, in)."""

    def __init__(
        self,
        packed: PackedWeight,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.nf = self.out_features  # what Conv1D calls it
        self.compute_dtype, self.transposed = compute_dtype, transposed
        self.hold(packed, dtype)
        self.register_parameter("bias", bias)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedTensor,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        activations: Activations | None = None,
    ) -> QuantizedLinear:
        """A module around a quantized matrix (out_features, in_features), with dynamic `activations` perhaps."""
        return cls(replace(BITS.pack(quantized), activations=activations), bias, dtype)

    @property
    def W_q(self) -> Tensor:
        """The packed codes. PEFT asks what has an attribute of this name for `dequantize()`: its DoRA needs norms."""
        return self._held(self._keys[0])

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.compute_dtype is None else input.to(self.compute_dtype)
        if torch.compiler.is_compiling():
            return self.traced(x, self.bias).to(input.dtype)
        kernel, packed = self.ready(x)
        return packed_linear(x, packed, self.bias, kernel).to(input.dtype)

    def reset_parameters(self) -> None:
        """Nothing to draw: the weight is what was quantized."""

    def extra_repr(self) -> str:
        how = "" if self.activations is None else f", activations={self.activations}"
        return f"{super().extra_repr()}, format={self.format}{how}"
