"""Compiled kernels for the processor: csrc/ in C++17, called through ctypes."""

from __future__ import annotations

from whit.kernels.cpu.binding import library
from whit.kernels.cpu.gram import add_gram
from whit.kernels.cpu.kernel import Cpu
from whit.kernels.cpu.kernel8 import Cpu8
from whit.kernels.cpu.weight import LAYOUT

__all__ = ["LAYOUT", "Cpu", "Cpu8", "add_gram", "library"]
