"""How a packed weight is multiplied. A new kernel is one file and one row of dispatch.KERNELS."""

from __future__ import annotations

from whit.kernels.autograd import packed_linear
from whit.kernels.base import Kernel
from whit.kernels.cpu import Cpu8, add_gram
from whit.kernels.dispatch import KERNELS, Choice, choice_key, explain, select
from whit.kernels.gpu import Gpu
from whit.kernels.ops import packed_arguments, packed_linear_op, packed_numbers
from whit.kernels.unpack import dequantize

__all__ = [
    "KERNELS",
    "Choice",
    "Cpu8",
    "Gpu",
    "Kernel",
    "add_gram",
    "choice_key",
    "dequantize",
    "explain",
    "packed_arguments",
    "packed_linear",
    "packed_linear_op",
    "packed_numbers",
    "select",
]
