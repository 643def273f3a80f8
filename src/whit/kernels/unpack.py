"""The floats that a packed weight stands for, by the fastest kernel that gives exactly those of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.formats import parse_format
from whit.formats.bands import banded, places
from whit.formats.lowrank import A, B, product, split
from whit.kernels import reference
from whit.kernels.cpu import Cpu
from whit.kernels.gpu import runs
from whit.kernels.gpu.dequantize import dequantize as dequantize_gpu
from whit.kernels.gpu.kernel import DTYPES, why_not
from whit.kernels.gpu.scales import storage
from whit.layouts import WHOLE_BITS
from whit.layouts.stream import unpack_stream
from whit.layouts.whole import integers, is_ternary
from whit.tensor import PackedWeight, matrix_shape


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats that a packed weight stands for, in its shape."""
    if (parts := split(packed)) is not None:
        codes, b, a = parts
        return (dequantize(codes, torch.float32) + product({B: b, A: a})).to(dtype)
    if (bands := banded(packed)) is not None:
        place = places(unpack_stream(packed.tensors["codes"], packed.shape[0], packed.format.bits, 0))
        return torch.cat([dequantize(band, dtype) for band in bands])[place]
    if packed.layout == WHOLE_BITS.name and is_ternary(packed.format):
        packed = integers(packed)
    compiled = Cpu()
    if packed.device.type == "cpu" and not torch.compiler.is_compiling() and compiled.decodes(packed, dtype) is None:
        return compiled.dequantize(packed, dtype)
    if packed.layout != "bits" or dtype not in DTYPES or why_not(packed.device) is not None:
        return reference.dequantize(packed, dtype)
    if not torch.compiler.is_compiling():
        return _dequantize(packed, dtype)
    keys, tensors = ",".join(packed.tensors), list(packed.tensors.values())
    found: Tensor = torch.ops.whit.gpu_dequantize(tensors, keys, str(packed.format), list(packed.shape), dtype)
    return found


def _dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    stored = storage(packed.format)
    if not isinstance(stored, str):
        return dequantize_gpu(packed, dtype, stored).reshape(packed.shape)
    found = runs.scheme(packed.format, matrix_shape(packed.shape)[1])
    if isinstance(found, str) or runs.unaligned(packed, found) is not None:
        return reference.dequantize(packed, dtype)
    return runs.dequantize(packed, dtype, found).reshape(packed.shape)


def dequantize_op(tensors: list[Tensor], keys: str, spec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """`dequantize` for torch.compile: the packed weight as its tensors, their names and the format's name."""
    named = dict(zip(keys.split(","), tensors, strict=True))
    return _dequantize(PackedWeight("bits", parse_format(spec), tuple(shape), named), dtype)


_op = torch.library.custom_op("whit::gpu_dequantize", dequantize_op, mutates_args=(), device_types="cuda")


@_op.register_fake
def _(tensors: list[Tensor], keys: str, spec: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(shape, dtype=dtype)
