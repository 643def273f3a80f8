"""A stack of expert matrices, packed: stands where a mixture's 3-D Parameter (experts, out, in) stood, or
(experts, in, out), as gpt-oss and Llama 4 hold theirs; packed it is (experts, out, in) either way.

transformers' eager experts multiply by `self.gate_up_proj[expert]`: indexing decodes that one expert. Code that takes
the stack whole (torch.bmm and the like) gets it dequantized whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whit.modules.packed import PackedModule
from whit.tensor import PackedWeight, turned


class QuantizedExperts(PackedModule):
    """Indexing gives floats in the module's dtype. `transposed`: each matrix as (in, out)."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype = torch.float32, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.hold(packed, dtype)

    @property
    def shape(self) -> torch.Size:
        shape = self.weight_shape
        return torch.Size(turned(shape) if self.transposed else shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __len__(self) -> int:
        return self.weight_shape[0]

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """The matrices (*index.shape, *shape[1:]) of one expert or of several."""
        chosen = torch.as_tensor(index)
        lines = torch.arange(self.weight_shape[1], device=chosen.device)
        found = self.rows(chosen[..., None] * self.weight_shape[1] + lines).to(self.weight.dtype)
        return found.mT if self.transposed else found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def floats(value: Any) -> Any:
            return value.whole() if isinstance(value, cls) else value

        return func(*map(floats, args), **{key: floats(value) for key, value in (kwargs or {}).items()})

    def whole(self) -> Tensor:
        """The floats of all experts, in the shape in which the model holds them."""
        floats = self.dequantize()
        return floats.mT if self.transposed else floats

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, format={self.format}"
