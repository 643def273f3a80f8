"""Kernels for NVIDIA GPUs."""

from __future__ import annotations

from whit.kernels.gpu.kernel import Gpu

__all__ = ["Gpu"]
