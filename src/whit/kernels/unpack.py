"""The floats that a packed weight stands for, by the fastest kernel that gives exactly those of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.kernels import reference
from whit.kernels.gpu.dequantize import dequantize as dequantize_gpu
from whit.kernels.gpu.kernel import DTYPES, why_not
from whit.kernels.gpu.scales import storage
from whit.tensor import PackedWeight


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats that a packed weight stands for, in its shape."""
    if packed.layout == "bits" and dtype in DTYPES and why_not(packed.device) is None:
        stored = storage(packed.format)
        if not isinstance(stored, str):
            return dequantize_gpu(packed, dtype, stored).reshape(packed.shape)
    return reference.dequantize(packed, dtype)
