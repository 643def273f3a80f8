"""The dispatch table's row for ternary weights on Hopper: they are integers of 2 bits once their digits are turned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.base import QUANTIZED_INPUTS
from whit.kernels.gpu import stream
from whit.kernels.gpu.kernel import DTYPES, Gpu, why_not
from whit.kernels.gpu.kernel_runs import GpuRuns
from whit.kernels.gpu.launches import ARRIVED
from whit.kernels.gpu.tiled import has_wgmma
from whit.layouts import BITS, WHOLE_BITS
from whit.layouts.whole import as_whole, integers, integers_of, is_ternary
from whit.tensor import PackedWeight


@dataclass(frozen=True)
class Whole(PackedWeight):
    """A ternary weight in whole bits, and the same as integers that the kernels of these have prepared."""

    integers: PackedWeight


@dataclass(frozen=True)
class GpuTernary:
    """Five digits to a byte cost more to take apart than the fifth of memory that they save takes to read.

    So a module that multiplies by them holds 2-bit codes instead (`layouts.WHOLE_BITS`), and gives back digits where it
    is saved or moved. A weight that was not prepared runs from its digits.
    """

    invariant: bool = False

    @property
    def name(self) -> str:
        return "gpu-ternary-invariant" if self.invariant else "gpu-ternary"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        reason: str | None = why_not_turned(packed) or why_not(x.device)
        if reason is not None:
            return reason
        if not has_wgmma(x.device):
            return "the device is no Hopper"
        return None if x.dtype in DTYPES else f"activations are {x.dtype}, not bfloat16 or float16"

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if isinstance(packed, Whole) or (packed.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return packed  # what a graph's recording makes is the graph's
        whole = packed if packed.layout == WHOLE_BITS.name else as_whole(packed)
        ready = Gpu(self.invariant).prepare(integers(whole))
        tensors = {**whole.tensors, ARRIVED: ready.tensors[ARRIVED]} if ARRIVED in ready.tensors else whole.tensors
        return Whole(
            whole.layout, whole.format, whole.shape, tensors, deterministic=whole.deterministic, integers=ready
        )

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        if packed.layout == BITS.name:
            if not self.invariant:
                return GpuRuns().linear(x, packed, bias)
            packed = as_whole(packed)
        return Gpu(self.invariant).linear(x, packed.integers if isinstance(packed, Whole) else integers(packed), bias)


def why_not_turned(packed: PackedWeight) -> str | None:
    """Why a weight is not for the kernels of integers, or None."""
    if not is_ternary(packed.format):
        return f"{packed.format} is not ternary"
    if packed.activations is not None:
        return QUANTIZED_INPUTS
    if packed.layout not in (BITS.name, WHOLE_BITS.name) or len(packed.shape) != 2:
        return f"layout {packed.layout} of shape {tuple(packed.shape)}"
    found = stream.scheme(integers_of(packed.format), packed.shape[1])
    return found if isinstance(found, str) else None
