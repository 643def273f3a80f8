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

from whit.kernels import (
    Choice,
    Kernel,
    choice_key,
    dequantize,
    packed_arguments,
    packed_linear_op,
    packed_numbers,
    select,
)
from whit.layouts import layout_named
from whit.layouts.whole import as_stored
from whit.modules.refusing import refusing
from whit.tensor import Activated, Format, PackedWeight

FLOATS = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by bytes


class PackedModule(nn.Module):
    """Holds a PackedWeight. Casting the module casts what surrounds the packed tensors, never these."""

    format: Format
    layout: str
    weight_shape: tuple[int, ...]
    weight: Tensor
    activations: Activated | None
    deterministic: bool
    _comes_and_goes = False

    def hold(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        """Take the packed tensors as buffers; `dtype` is the type in which the module stands in for floats."""
        self.format, self.layout, self.weight_shape = packed.format, packed.layout, tuple(packed.shape)
        self.activations, self.deterministic = packed.activations, packed.deterministic
        self._keys, self._numbers = tuple(packed.tensors), packed_numbers(packed)
        self._ready: dict[Choice, tuple[Kernel, PackedWeight]] = {}
        self._kinds: dict[str, torch.dtype] = {}
        self._parameters.pop("weight", None)
        for key, tensor in packed.tensors.items():
            self.register_buffer(key, tensor)
        empty = torch.empty(packed.shape[0], 0, dtype=dtype, device=packed.device)
        self.register_buffer("weight", refusing(empty), persistent=False)

    @property
    def _is_hf_initialized(self) -> bool:
        """What transformers asks before it draws the numbers of a fresh module.

        It would draw some for the empty `weight`, and how large by its shape: SigLIP's rule divides by its columns.
        """
        return self._has_all()

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, done: bool) -> None:
        """transformers notes that it has asked."""

    def _has_all(self) -> bool:
        """Whether nothing beside the packed tensors is to be made: a bias, say, that no file has."""
        own = (parameter for parameter in self._parameters.values() if parameter is not None)
        return all(getattr(parameter, "_is_hf_initialized", False) for parameter in own)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight as a file has it."""
        return as_stored(self._lying)

    @property
    def _lying(self) -> PackedWeight:
        """The packed weight as it lies now, which is another layout where a kernel wants one."""
        tensors = {key: self._held(key) for key in self._keys}
        how, alone = self.activations, self.deterministic
        return PackedWeight(self.layout, self.format, self.weight_shape, tensors, activations=how, deterministic=alone)

    def set_deterministic(self, on: bool) -> None:
        """Whether a row of a product must be the same bits whatever rows are beside it."""
        self.deterministic = on
        self._numbers = packed_numbers(self._lying)
        self._ready.clear()

    def _held(self, key: str) -> Tensor:
        """A packed tensor: a buffer, or a frozen parameter where `make_shardable` has made it one."""
        found, kind = self._stored(key), self._kinds.get(key)
        return found if kind is None else found.view(kind)

    def _stored(self, key: str) -> Tensor:
        """The same as it is registered: integers that are parameters are said to be floats of as many bytes."""
        found = self._buffers.get(key)
        return found if found is not None else self._parameters[key]  # type: ignore[return-value]

    def make_shardable(self) -> list[nn.Parameter]:
        """Hold the packed tensors as frozen parameters, which torch's `fully_shard` spreads over processes.

        Scalars stay buffers. What a kernel would prepare is not held: other bytes lie there at the next call. Up to
        torch 2.11 it takes floats alone, so integers are given to it as floats of as many bytes; it moves bytes.
        """
        self._put_back()
        for key in self._keys:
            tensor = self._buffers.get(key)
            if tensor is not None and tensor.dim():
                del self._buffers[key]
                if not tensor.is_floating_point():
                    self._kinds[key] = tensor.dtype
                    tensor = tensor.view(FLOATS[tensor.dtype.itemsize])
                self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        self._ready.clear()
        self._comes_and_goes = True
        return self.shardable

    @property
    def shardable(self) -> list[nn.Parameter]:
        """The packed tensors that are parameters: none, unless `make_shardable` was called."""
        return [p for key in self._keys if (p := self._parameters.get(key)) is not None]

    def ready(self, x: Tensor) -> tuple[Kernel, PackedWeight]:
        """The kernel that multiplies activations such as `x`, and the weight as this kernel prepared it, once."""
        if self._comes_and_goes:
            return select(stored := self._lying, x), stored
        found = self._ready.get(key := choice_key(x))
        if found is not None and found[1].tensors[self._keys[0]] is self._held(self._keys[0]):
            return found
        stored = self._lying
        kernel = select(stored, x)
        prepared = next((p for k, p in self._ready.values() if k is kernel and self._holds(p)), None)
        if prepared is None:
            with torch.inference_mode(False):  # what the module holds from now on must not be tied to such a mode
                prepared = kernel.prepare(stored)
            if prepared.layout != stored.layout and is_offloaded(self):
                return kernel, stored
            self._adopt(prepared)
        self._ready[key] = kernel, prepared
        return kernel, prepared

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x (..., in_features) as one operator, which torch.compile takes without looking inside."""
        tensors, names = packed_arguments(self._lying, self._numbers)
        return packed_linear_op(x, tensors, bias, *names)  # type: ignore[no-any-return]

    def take(self, x: Tensor, kernel: Kernel, prepared: PackedWeight) -> None:
        """Hold what a kernel prepared elsewhere, for activations such as `x`; equal values under the layout's keys."""
        self._adopt(prepared)
        self._ready[choice_key(x)] = kernel, prepared

    def _holds(self, prepared: PackedWeight) -> bool:
        return all(prepared.tensors[key] is self._held(key) for key in self._keys)

    def _adopt(self, prepared: PackedWeight) -> None:
        """Hold the prepared tensors in place of the stored ones, so that there are not two copies."""
        self.layout = prepared.layout
        for key in self._keys:
            self._buffers[key] = prepared.tensors[key]
        self._ready = {key: found for key, found in self._ready.items() if self._holds(found[1])}

    def _put_back(self) -> None:
        """Hold the tensors that a file has, whose shapes and values are asked for from outside."""
        if (stored := as_stored(lying := self._lying)) is not lying:
            self._adopt(stored)
            self._ready.clear()

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
        self._put_back()
        held = {id(self._stored(key)) for key in self._keys}

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in held or moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._ready.clear()
        return super()._apply(move_only, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._put_back()
        self._ready.clear()  # new values come into the same tensors
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (lying := self._lying).layout != (stored := as_stored(lying)).layout:
            destination |= {prefix + key: tensor for key, tensor in stored.tensors.items()}
        for key in self._keys:  # as stored, whatever order of strides a kernel holds them in
            destination[prefix + key] = destination[prefix + key].contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}


def prepare(model: nn.Module, dtype: torch.dtype, rows: int = 1) -> None:
    """Do now what the first call with `rows` rows of `dtype` activations would do in every packed linear of a model.

    One module at a time, each in place of its stored tensors: the peak is one weight above what the model holds.
    """
    for module in model.modules():
        if isinstance(module, PackedModule) and isinstance(module, nn.Linear):
            module.ready(torch.empty(rows, module.in_features, dtype=dtype, device=module.weight.device))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's tensors, as they are stored, for every forward."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


@contextmanager
def resident(module: PackedModule) -> Iterator[PackedWeight]:
    """The packed weight where it can be computed with, for a use that is not the module's own forward.

    accelerate keeps the tensors of an offloaded module elsewhere and brings them for its forward only.
    """
    hook = getattr(module, "_hf_hook", None) if module._lying.device.type == "meta" else None
    if hook is None:
        yield module._lying
        return
    hook.pre_forward(module)
    try:
        yield module._lying
    finally:
        hook.post_forward(module, None)
