"""What every module with a packed weight shares: the buffers, and what may and may not be cast.

The packed tensors are buffers under their layout's keys. `weight` stays as an empty buffer (out_features, 0): model
code asks it for its dtype and device, and anything that would multiply by it or add to it fails on the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whit.kernels import Kernel, dequantize
from whit.layouts import layout_named
from whit.tensor import Format, PackedWeight


class PackedModule(nn.Module):
    """Holds a PackedWeight. Casting the module casts what surrounds the packed tensors, never these."""

    format: Format
    layout: str
    weight_shape: tuple[int, ...]
    weight: Tensor

    def hold(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        """Take the packed tensors as buffers; `dtype` is the type in which the module stands in for floats."""
        self.format, self.layout, self.weight_shape = packed.format, packed.layout, tuple(packed.shape)
        self._keys = tuple(packed.tensors)
        self._kernels: dict[Any, Kernel] = {}
        self._parameters.pop("weight", None)
        for key, tensor in packed.tensors.items():
            self.register_buffer(key, tensor)
        empty = torch.empty(packed.shape[0], 0, dtype=dtype, device=packed.device)
        self.register_buffer("weight", empty, persistent=False)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight as it lies now."""
        tensors = {key: self._buffers[key] for key in self._keys}
        return PackedWeight(self.layout, self.format, self.weight_shape, tensors)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as floats, in the module's own dtype unless another is given."""
        with resident(self) as packed:
            return dequantize(packed, dtype or self.weight.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Decoded rows (*index.shape, in_features) of the weight seen as a matrix, in float32."""
        with resident(self) as packed:
            floats = layout_named(self.layout).rows(packed, index.reshape(-1).to(packed.device))
        return floats.reshape(*index.shape, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        held = {id(self._buffers[key]) for key in self._keys}

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in held or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": {}}


@contextmanager
def resident(module: PackedModule) -> Iterator[PackedWeight]:
    """The packed weight where it can be computed with, for a use that is not the module's own forward.

    accelerate keeps the tensors of an offloaded module elsewhere and brings them for its forward only.
    """
    hook = getattr(module, "_hf_hook", None) if module.packed.device.type == "meta" else None
    if hook is None:
        yield module.packed
        return
    hook.pre_forward(module)
    try:
        yield module.packed
    finally:
        hook.post_forward(module, None)
