"""Static ranges that follow what a model is given while it runs: a moving average per linear, as QAT tracks them.

    with whit.track_ranges(model, momentum=0.01):
        for batch in batches:
            model(**batch)

A call in which the smallest and largest input of a linear are l and h moves its range by low += momentum (l - low) and
high += momentum (h - high), before the call's inputs are quantized with it. Afterwards the ranges stay as they are, and
are saved with the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whit.activations import LARGEST, MOMENTUM
from whit.capabilities import rotation
from whit.errors import KernelError
from whit.modules.linear import QuantizedLinear
from whit.rotation import rotate


@contextmanager
def track_ranges(model: nn.Module, momentum: float = MOMENTUM, restart: bool = False) -> Iterator[None]:
    """While entered, the static scales of all packed linears of `model` follow their inputs (int8 and FP8).

    They start from the calibrated ranges or, with `restart`, from those of the first call; each later call counts with
    weight `momentum`. A call whose inputs are not all finite changes nothing. Nothing waits for the device. KernelError
    if `momentum` is not in (0, 1], or if no linear has a static range (activations such as `int8-static`).
    """
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear) and _is_static(m)]
    if not 0 < momentum <= 1 or not linears:
        raise KernelError(
            f"track_ranges: momentum {momentum}, {len(linears)} linears with static ranges; it must be in (0, 1], and "
            "there must be some; quantize with activations such as int8-static"
        )
    hooks = [linear.register_forward_pre_hook(_Range(linear, momentum, restart).follow) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Range:
    """The range of one linear, float32 scalars on its device."""

    def __init__(self, linear: QuantizedLinear, momentum: float, restart: bool) -> None:
        how = linear.activations
        assert how is not None
        self._momentum, self._largest, self._symmetric = momentum, LARGEST[how.dtype], how.symmetric
        self._ends = None if restart else self._stored(linear)

    def follow(self, linear: Any, args: tuple[Any, ...]) -> None:
        """Move the range by one call, and put its scale into the linear."""
        x = args[0].detach()
        if not x.numel():
            return
        if turn := rotation(linear.format):
            x = rotate(x.to(torch.float32), turn)
        now = torch.stack(torch.aminmax(x)).to(torch.float32)
        before = self._stored(linear) if self._ends is None else self._ends
        moved = now if self._ends is None else before + self._momentum * (now - before)
        good = torch.isfinite(now).all()
        self._ends = torch.where(good, moved, before)
        for name, value in self._scale(self._ends).items():
            held = linear.packed.tensors[name]
            held.copy_(torch.where(good, value.to(held.dtype), held))

    def _stored(self, linear: QuantizedLinear) -> Tensor:
        """The ends (2,) of the range that the linear has."""
        tensors = linear.packed.tensors
        scale = tensors["input_scale"].reshape(())
        if self._symmetric:
            return torch.stack([-scale, scale]) * self._largest
        zero = tensors["input_zero_point"].reshape(()).to(torch.float32)
        return torch.stack([(-128 - zero) * scale, (127 - zero) * scale])

    def _scale(self, ends: Tensor) -> dict[str, Tensor]:
        """As `calibration.ranges` makes them of a range: scale 1 where it is 0."""
        if self._symmetric:
            scale = ends.abs().amax() / self._largest
            return {"input_scale": torch.where(scale > 0, scale, 1.0)}
        low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
        scale = (high - low) / (2 * self._largest + 1)
        scale = torch.where(scale > 0, scale, 1.0)
        return {"input_scale": scale, "input_zero_point": (-128 - low / scale).round().clamp(-128, 127)}


def _is_static(linear: QuantizedLinear) -> bool:
    return linear.activations is not None and linear.activations.kind == "static"
