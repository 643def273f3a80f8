"""Kernels for NVIDIA GPUs."""

from __future__ import annotations

from whit.kernels.gpu.kernel import Gpu
from whit.kernels.gpu.kernel8 import Gpu8
from whit.kernels.gpu.kernel_float8 import GpuFloat8
from whit.kernels.gpu.kernel_runs import GpuRuns
from whit.kernels.gpu.kernel_ternary import GpuTernary

__all__ = ["Gpu", "Gpu8", "GpuFloat8", "GpuRuns", "GpuTernary"]
