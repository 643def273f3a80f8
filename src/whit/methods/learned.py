"""The params of a quantized matrix in training: float32 masters, and what they are rounded to in storage.

Continuous params are rounded to the type they are stored in. Integer ones (`capabilities.rounded`: zero points, the
sub-scales of k-quants) are rounded and clamped to their bits. Those that are quantized themselves are re-encoded with
their own params, which stay. Other integers (MXFP4's exponents) stay.

A master is p = p_start + move unit; a unit moves the weights that share the param by one step of the format (root mean
square), so that one rate serves all params of all matrices. `plain` has units of 1 instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.capabilities import learned, rounded
from whit.methods.units import TINY, unit_of
from whit.tensor import Params, QuantizedTensor, tensor_param

BEYOND = 1e30  # further than any number of any group
LEAST = 0.125  # of itself: how small training may make a scale, which may also grow by 1 - LEAST


class Learned:
    """`step` (rows, columns) is the distance of neighbouring numbers around each weight of `start`."""

    def __init__(self, start: QuantizedTensor, step: Tensor, plain: bool = False) -> None:
        self.start, self.format = start, start.format
        self.params: Params = start.params
        self.integers = _largest_integers(start)
        self.moves: dict[str, Tensor] = {}
        self.units: dict[str, Tensor] = {}
        for name in learned(self.format):
            value = self._plain(name)
            self.moves[name] = torch.zeros_like(value)
            self.units[name] = torch.ones_like(value) if plain else self._unit(name, value, step)
        self.scales = self._find_scales(step)

    def store(self) -> Params:
        """The params as they now are, in the types in which they are stored; `params` from here on."""
        new = dict(self.start.params)
        for name, move in self.moves.items():
            exact = torch.addcmul(self._plain(name), move, self.units[name])
            old = self.start.params[name]
            if isinstance(old, QuantizedTensor):
                codes = old.format.encode(exact.reshape(old.codes.shape), old.params)
                new[name] = QuantizedTensor(old.format, old.shape, codes, old.params)
            elif name in self.integers:
                new[name] = exact.round_().clamp_(0, self.integers[name]).to(old.dtype)
            else:
                new[name] = exact.to(old.dtype)
        self.params = new
        return new

    def used(self) -> dict[str, Tensor]:
        """The learned params as float32 tensors of their own, to take gradients in."""
        return {
            name: tensor_param(self.params, name).to(torch.float32, copy=True).requires_grad_() for name in self.moves
        }

    def gradients(self, decoded: Tensor, used: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        """In the moves, from that in `decoded`, which was computed from `used`."""
        if not used:
            return {}
        found = torch.autograd.grad(decoded, list(used.values()), gradient, allow_unused=True)
        return {
            name: torch.zeros_like(self.moves[name]) if grad is None else grad * self.units[name]
            for name, grad in zip(used, found, strict=True)
        }

    def confine(self) -> None:
        """Bring back what went too far: scales keep their sign and size, integers their bits."""
        for name, move in self.moves.items():
            value, unit = self._plain(name), self.units[name].clamp(min=TINY)
            if name in self.integers:
                low, high = -value / unit, (self.integers[name] - value) / unit
            elif name in self.scales:
                high = value.abs() * (1 - LEAST) / unit
                low = -high
            else:
                continue
            torch.minimum(torch.maximum(move, low, out=move), high, out=move)

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The codes (rows, columns) of the lowest and the highest numbers."""
        low, high = (self.format.encode(torch.full_like(like, end), self.params) for end in (-BEYOND, BEYOND))
        return low, high

    def _plain(self, name: str) -> Tensor:
        return tensor_param(self.start.params, name).to(torch.float32)

    def _unit(self, name: str, value: Tensor, step: Tensor) -> Tensor:
        unit = unit_of(name, value, self.start, step)
        return unit.reshape(-1, 1).expand(-1, value.numel() // unit.numel()).reshape(value.shape)  # finer sub-scales

    def _find_scales(self, like: Tensor) -> set[str]:
        """Params that the distances between numbers grow with: all but offsets and integers."""
        used = {name: value for name, value in self.used().items() if name not in self.integers}
        if not used:
            return set()
        with torch.enable_grad():
            low, high = (self.format.decode(codes, {**self.params, **used}) for codes in self.ends(like))
            found = torch.autograd.grad((high - low).abs().sum(), list(used.values()), allow_unused=True)
        return {name for name, grad in zip(used, found, strict=True) if grad is not None and bool((grad != 0).any())}


def _largest_integers(quantized: QuantizedTensor) -> dict[str, int]:
    """The integer params that are learned, and the largest value of each."""
    rows, columns = quantized.codes.shape
    specs = quantized.format.param_specs(rows, columns)
    return {name: (1 << specs[name].bits) - 1 for name in rounded(quantized.format)}
