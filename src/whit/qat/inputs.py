"""Inputs of linears in training: rounded as they will be when the packed model runs.

Dynamic ones have scales of their own making, and gradients pass as if nothing was rounded. Static ones have a scale
that is learned, and a zero point where they are asymmetric (LSQ, Esser et al. 2020; LSQ+, Bhalgat et al. 2020):

    x^ = s (clamp(round(x / s) + z) - z)
    dx^/dx = 1 within the range, 0 beyond;   dx^/ds = (x^ - x) / s within, x^ / s beyond;   dx^/dz = 0 within, -s beyond

Masters are s = s_start 2^m and z = round(z_start + ZERO_UNIT m): what `activations` of the packed model are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whit.activations import Activations
from whit.errors import RecipeError
from whit.formats.microfloat import E4M3_MAX
from whit.kernels import float8, int8
from whit.kernels.inputs import decoded, rounded_inputs
from whit.rotation import rotate
from whit.tensor import QuantizedTensor

SCALE, ZERO = "input_scale", "input_zero_point"
ZERO_UNIT = 16.0  # codes of 256: one rate serves scales and zero points
LOW, HIGH = -128, 127


class Range:
    """The static range of one linear's inputs on its way: a `Trained`. `start` holds what calibration found for it."""

    def __init__(self, holder: str, how: Activations, start: Mapping[str, Tensor], device: torch.device) -> None:
        self.names = {key: f"{holder}.{key}" for key in how.specs}
        self.start = {key: start[key].to(device, torch.float32) for key in self.names}
        self.moves = {key: torch.zeros_like(value) for key, value in self.start.items()}

    @property
    def variables(self) -> dict[str, Tensor]:
        """What may be moved in place: octaves of the scale, ZERO_UNITs of the zero point."""
        return dict(self.moves)

    def decode(self) -> dict[str, Tensor]:
        """`input_scale` and `input_zero_point` of the linear, float32 (1,)."""
        found = {self.names[SCALE]: self._scale()}
        if ZERO in self.names:
            found[self.names[ZERO]] = torch.add(self.start[ZERO], self.moves[ZERO], alpha=ZERO_UNIT).round_()
        return found

    def gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From a loss's gradients in what `decode` gave to those in `variables`."""
        found = {SCALE: gradients[self.names[SCALE]].float() * self._scale() * math.log(2)}
        if ZERO in self.names:
            found[ZERO] = gradients[self.names[ZERO]].float() * ZERO_UNIT
        return found

    def confine(self) -> None:
        """A zero point is a code; a scale stays above 0 by itself."""
        if ZERO in self.names:
            low, high = ((end - self.start[ZERO]) / ZERO_UNIT for end in (LOW, HIGH))
            torch.minimum(torch.maximum(self.moves[ZERO], low), high, out=self.moves[ZERO])

    def values(self) -> dict[str, QuantizedTensor | Tensor]:
        """What `decode` gives, as it will be stored: float32 and int8."""
        types = {SCALE: torch.float32, ZERO: torch.int8}
        decoded = self.decode()
        return {name: decoded[name].to(types[key]) for key, name in self.names.items()}

    def _scale(self) -> Tensor:
        return self.start[SCALE] * torch.exp2(self.moves[SCALE])


def round_inputs(module: nn.Module, how: Activations, start: Mapping[str, Tensor] | None = None, turn: int = 0) -> None:
    """From here on a linear rounds its inputs; static ranges are parameters of it, float32, for `start` as yet.

    Where the codes are of a rotated matrix, `turn` columns are rotated together before, and back after.

    RecipeError for outlier columns, which stay in floats and cannot be learned around.
    """
    if how.threshold or how.exact:
        raise RecipeError(f"activations {how}: training rounds all columns; use int8, or a static range")
    for key, value in (start or {}).items():
        module.register_parameter(key, nn.Parameter(value.to(torch.float32), requires_grad=False))
    module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0], module, how, turn), *inputs[1:]))


def rounded(x: Tensor, module: nn.Module, how: Activations, turn: int = 0) -> Tensor:
    """x as the packed linear sees it, in its own type; differentiable in x and in the range's parameters."""
    if turn:
        return rotate(rounded(rotate(x, turn), module, how), turn)
    if how.kind == "static":
        found: Tensor = _Static.apply(x, getattr(module, SCALE), getattr(module, ZERO, None), how.dtype)  # type: ignore[no-untyped-call]
        return found
    near = rounded_inputs(x.detach().reshape(-1, x.shape[-1]), how)
    return x + (near.reshape(x.shape).to(x.dtype) - x.detach())


class _Static(torch.autograd.Function):
    """Inputs x (..., in) by a scale and zero point (1,), both float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        flat, kept = x.reshape(-1, x.shape[-1]), None if zero is None else zero.to(torch.int8)
        rows = float8.quantize_static(flat, scale) if dtype != torch.int8 else int8.quantize_static(flat, scale, kept)
        near = decoded(rows).reshape(x.shape)
        ctx.save_for_backward(x, scale, zero, near)
        ctx.dtype = dtype
        return near.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, scale, zero, near = ctx.saved_tensors
        gradient, wide = grads[0].to(torch.float32), x.to(torch.float32)
        steps = wide * (1 / scale)
        if ctx.dtype == torch.int8:
            steps = steps.round() + (0 if zero is None else zero)
            within = (steps >= LOW) & (steps <= HIGH)
        else:
            within = steps.abs() <= E4M3_MAX
        moved = torch.where(within, near - wide, near) / scale
        in_scale = (gradient * moved).sum(dtype=torch.float64).reshape(1).to(torch.float32)
        in_zero = None
        if zero is not None:
            in_zero = (gradient * ~within).sum(dtype=torch.float64).reshape(1).to(torch.float32) * -scale
        return torch.where(within, grads[0], 0), in_scale, in_zero, None
