"""A product's launch that a weight keeps: made once, and started for every other x of as many rows.

Which kernel runs, how it is cut and all that its argument says of the weight depend on the weight and the rows, and
take the host longer than a small product takes the device. What a call brings are the addresses of x, y, the bias and
the room for partial sums, which the arguments of all kernels have under these names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.gpu import maps, nvrtc
from whit.kernels.gpu.launches import Call
from whit.kernels.gpu.many import BOX_OUTS, BOX_ROWS
from whit.tensor import PackedWeight

MOST = 64  # launches that a weight keeps, of a kilobyte each
WORD = 8  # bytes of an address
Key = tuple[int, torch.dtype, int, bool, bool]


@dataclass(frozen=True)
class Again:
    """A launch without the tensors that it was made for: `x` and `partial` are their shapes, `outs` is y's width."""

    launch: nvrtc.Launch
    x: tuple[int, int]
    outs: int
    partial: tuple[int, ...] | None
    box: int
    boxes: bool
    lie: tuple[int, ...]  # where the weight's tensors lay
    holds: Tensor | None  # what else the argument points to

    @classmethod
    def of(cls, call: Call, lie: tuple[int, ...]) -> Again:
        """The launch of a product with one weight, whose tensors lie at these addresses."""
        (rows, columns), (y,) = call.x.shape, call.ys
        partial = None if call.partial is None else tuple(call.partial.shape)
        return cls(call.launch, (rows, columns), y.shape[1], partial, call.box, call.boxes, lie, call.arrived)

    def start(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Enqueue it on torch's stream for contiguous x (..., columns) that begins at 16 bytes: y (..., outs)."""
        kind = type(self.launch.params)
        words = _words(kind).from_buffer_copy(self.launch.params)
        y = x.new_empty((*x.shape[:-1], self.outs))
        words[place(kind, "y")] = y.data_ptr()
        if self.box:
            at = place(kind, "x_map")
            words[at : at + 16] = list(maps.tiles_of(x.data_ptr(), *self.x, self.box, 64, 2))
        else:
            words[place(kind, "x")] = x.data_ptr()
        if self.boxes:
            at = place(kind, "boxes")
            words[at : at + 16] = list(maps.tiles_of(y.data_ptr(), self.x[0], self.outs, BOX_ROWS, BOX_OUTS, 2))
        if bias is not None:
            words[place(kind, "bias")] = bias.data_ptr()
        if self.partial is not None:
            room = torch.empty(self.partial, dtype=torch.float32, device=x.device)
            words[place(kind, "partial")] = room.data_ptr()
        self.launch.start(nvrtc.stream_on(x.get_device()), words)
        return y


@dataclass(frozen=True)
class Prepared(PackedWeight):
    """A weight with what kernels derived of it and the launches that it keeps, which are never saved."""

    kept: dict[Key, Again] = field(default_factory=dict, init=False, compare=False, repr=False)

    def again(self, x: Tensor, bias: Tensor | None, invariant: bool) -> Tensor | None:
        """The product with x (..., columns) by a launch that was kept; None where there is none for such an x."""
        found = self.kept.get(_key(x, bias, invariant))
        if found is None or found.lie != self._lie() or x.data_ptr() % 16 or not x.is_contiguous():
            return None
        return found.start(x, bias)

    def keep(self, call: Call, bias: Tensor | None, invariant: bool) -> None:
        """Keep the launch of a product with this weight; but for a graph's recording, whose memory is the graph's."""
        if call.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if len(self.kept) >= MOST:
            self.kept.clear()
        self.kept[_key(call.x, bias, invariant)] = Again.of(call, self._lie())

    def _lie(self) -> tuple[int, ...]:
        return tuple([tensor.data_ptr() for tensor in self.tensors.values()])


def _key(x: Tensor, bias: Tensor | None, invariant: bool) -> Key:
    return x.numel() // x.shape[-1], x.dtype, x.get_device(), bias is None, invariant


@lru_cache(maxsize=64)
def _words(kind: type[ctypes.Structure]) -> type[ctypes.Array[ctypes.c_uint64]]:
    return ctypes.c_uint64 * (ctypes.sizeof(kind) // WORD)


@lru_cache(maxsize=256)
def place(kind: type[ctypes.Structure], name: str) -> int:
    """The word of an argument for one weight at which its one field of that name lies."""
    (found,) = offsets(kind, name)
    return found // WORD


def offsets(kind: type[ctypes.Structure], name: str) -> Iterator[int]:
    """The bytes of an argument at which fields of that name lie, its own or its parts'."""
    for field_name, inner, *_ in kind._fields_:
        at: int = getattr(kind, field_name).offset
        element = getattr(inner, "_type_", inner)
        if field_name == name:
            yield at
        elif isinstance(element, type) and issubclass(element, ctypes.Structure):
            yield from (at + offset for offset in offsets(element, name))
