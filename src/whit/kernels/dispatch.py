"""Which kernel runs: the first row of KERNELS that supports the packed weight and the activations.

A new kernel is one file and one row here, above the slower ones. A weight whose inputs are quantized
(`packed.activations`) is for kernels that know that, and the others refuse it. A `deterministic` one has a table of its
own, INVARIANT, in which no row of a product depends on the others.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.kernels.activated import Activation8
from whit.kernels.bands import Banded
from whit.kernels.base import Kernel
from whit.kernels.cpu import Cpu, Cpu8
from whit.kernels.gpu import Gpu, Gpu8, GpuFloat8, GpuRuns, GpuTernary
from whit.kernels.invariant import RowByRow
from whit.kernels.reference import Reference
from whit.kernels.rotated import Rotation
from whit.kernels.side_car import SideCar
from whit.tensor import PackedWeight

PLAIN: tuple[Kernel, ...] = (Gpu(), GpuTernary(), GpuRuns(), Cpu())  # of inputs as they are
EIGHT: tuple[Kernel, ...] = (Gpu8(), GpuFloat8(), Cpu8(), Activation8())  # of quantized inputs
KERNELS: tuple[Kernel, ...] = (
    *(SideCar(kernel) for kernel in PLAIN), Banded((Gpu(), GpuRuns(), Cpu())), *PLAIN, *EIGHT,
    *(Rotation(kernel) for kernel in (*PLAIN, *EIGHT)), Reference(),
)  # fmt: skip

# Of weights that are `deterministic`. Streams of up to 4 rows on the CPU sum each in one order, a test says.
INVARIANT: tuple[Kernel, ...] = (
    Gpu(invariant=True), GpuTernary(invariant=True),
    *(RowByRow(kernel, 4 if kernel == Cpu() else 1) for kernel in KERNELS),
)  # fmt: skip

Choice: TypeAlias = tuple[torch.dtype, str, int]


def choice_key(x: Tensor) -> Choice:
    """What a choice of kernel depends on for a given weight: equal keys, equal kernels."""
    rows = x.numel() // max(x.shape[-1] if x.dim() else 1, 1)
    return x.dtype, x.device.type, max(rows - 1, 0).bit_length()


def _kernels(packed: PackedWeight) -> tuple[Kernel, ...]:
    return INVARIANT if packed.deterministic else KERNELS


def select(packed: PackedWeight, x: Tensor) -> Kernel:
    """The kernel for `x @ weight^T`; KernelError lists why none of them can."""
    for kernel in _kernels(packed):
        if kernel.supports(packed, x) is None:
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(packed, x))
    raise KernelError(f"{packed.format} in layout {packed.layout}: no kernel runs it here ({reasons})")


def explain(packed: PackedWeight, x: Tensor) -> tuple[tuple[str, str], ...]:
    """For each kernel in order: its name and `used`, `slower than <the used one>`, or the reason why not."""
    rows, used = [], ""
    for kernel in _kernels(packed):
        reason = kernel.supports(packed, x)
        if reason is None:
            reason, used = (f"slower than {used}", used) if used else ("used", kernel.name)
        rows.append((kernel.name, reason))
    return tuple(rows)
