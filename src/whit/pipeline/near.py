"""What the codes of a stack of experts stand for, decoded one expert at a time, never all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.methods.stack import can_stack
from whit.pipeline.plan import Item
from whit.tensor import QuantizedTensor, tensor_param


@dataclass(frozen=True)
class Near:
    """A stack's codes, whose format has no param that spans experts."""

    item: Item
    quantized: QuantizedTensor

    @classmethod
    def of(cls, item: Item, quantized: QuantizedTensor) -> Near | None:
        """None for what is not a stack, or can be decoded only as a whole."""
        is_stack = item.target is not None and item.target.kind == "experts"
        return cls(item, quantized) if is_stack and can_stack(quantized.format) else None

    @property
    def experts(self) -> int:
        assert self.item.target is not None
        return self.item.target.shape[0]

    def matrices(self) -> Iterator[Tensor]:
        """Every expert's (out, in), in float32."""
        codes = self.quantized.codes.chunk(self.experts)
        params = {name: tensor_param(self.quantized.params, name).chunk(self.experts) for name in self.quantized.params}
        for i, rows in enumerate(codes):
            part = {name: values[i] for name, values in params.items()}
            shape = (len(rows), self.quantized.shape[-1])
            yield QuantizedTensor(self.quantized.format, shape, rows, part).dequantize()

    def whole(self) -> Tensor:
        """The parameter in float32, in the model's own shape."""
        floats = torch.empty(self.item.spec.shape, device=self.quantized.codes.device)
        self.copy_to(floats)
        return floats

    def copy_to(self, parameter: Tensor) -> None:
        """Fill a parameter of the model's own shape and type."""
        assert self.item.target is not None
        for place, near in zip(parameter, self.matrices(), strict=True):
            place.copy_(near.mT if self.item.target.transposed else near)
