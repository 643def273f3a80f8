"""Kernels for NVIDIA GPUs."""

from __future__ import annotations

from whit.kernels.gpu.kernel import Gpu
from whit.kernels.gpu.kernel8 import Gpu8

__all__ = ["Gpu", "Gpu8"]
