"""A codebook's absmax once more in 16 bits, for products that memory limits: half of what is read of them.

absmax (outs, groups) float32 = halves (outs, groups) float16 * power (), a power of two per tensor, within 2^-11 of
each value: an eighth of the rounding to bfloat16 that levels and results have anyway. Zeros stay zeros. Where one value
is not finite, or below 2^-28 of the largest, where a float16 loses more, there are none and float32 is read. So it is
for float16 activations: their rounding is as small. Derived when a weight is prepared, never saved; products sum in
float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whit.kernels.gpu.scales import FLOATS, Scales
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

KIND = "-halves"  # what the tables of cuts call a weight that is read so
HALVES, POWER = "absmax_halves", "absmax_power"  # the derived tensors
HIGHEST, LOWEST = 15, 2.0**-14  # the largest value lies below 2^HIGHEST, all but zeros from LOWEST on
SMALLEST_POWER = -126  # that float32 holds with all its bits


def halved(absmax: Tensor) -> dict[str, Tensor]:
    """`absmax` (float32) as float16 of the same shape and the power of two, (), float32; nothing where that loses more.

    Waits for the device.
    """
    largest = absmax.abs().amax().item() if absmax.numel() else float("nan")
    if absmax.dtype != torch.float32 or not largest < float("inf"):
        return {}
    exponent = int(torch.frexp(torch.tensor(largest))[1]) - HIGHEST if largest else 0
    scaled = absmax.double() * 2.0**-exponent
    if exponent < SMALLEST_POWER or bool(((scaled != 0) & (scaled.abs() < LOWEST)).any()):
        return {}
    power = torch.full((), 2.0**exponent, dtype=torch.float32, device=absmax.device)
    return {HALVES: scaled.half(), POWER: power}


def read_as(packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> Scheme:
    """How a weight of `scheme` is read for activations of `dtype`: by halves where there are any and they do."""
    if HALVES not in packed.tensors or dtype != torch.bfloat16:
        return scheme
    return replace(scheme, storage=replace(scheme.storage, scale=FLOATS["f16"]))


def reads_halves(scheme: Scheme) -> bool:
    """Whether it is one of those: no codebook has float16 otherwise."""
    return bool(scheme.storage.levels) and scheme.storage.scale == FLOATS["f16"]


def scales(packed: PackedWeight) -> Scales:
    """Pointers to them; the power of two is where nested scales have their offset."""
    halves, power = packed.tensors[HALVES], packed.tensors[POWER]
    return Scales(halves.data_ptr(), None, None, power.data_ptr(), None, halves.shape[1], 0)
