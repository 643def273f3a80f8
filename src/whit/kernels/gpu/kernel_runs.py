"""The dispatch table's row for k-quants, ternary and binary on NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats import parse_format
from whit.formats.signs import Signs
from whit.kernels.base import QUANTIZED_INPUTS
from whit.kernels.gpu import runs, stream
from whit.kernels.gpu.kernel import ARRIVED, DTYPES, Gpu, why_not
from whit.layouts import BITS
from whit.layouts.digits import unpack_digits
from whit.layouts.stream import pack_stream
from whit.tensor import Format, PackedWeight, matrix_shape, radix

TWO_BITS = "two_bits"  # the derived tensor: codes of three values, two bits each


@dataclass(frozen=True)
class GpuRuns:
    """Weights whose scales belong to runs of columns, in bfloat16 and float16, on compute capability 8.0 and newer.

    Up to 16 rows meet weights that are decoded in registers; for more the matrix is dequantized for torch's product.
    Ternary weights that are prepared have their codes in two bits, too, and are multiplied as `int2` is: a quarter more
    bytes to read than five codes in a byte, but no digits to take apart, and the kernels of integers.
    """

    name: ClassVar[str] = "gpu-runs"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        reason: str | None = why_not(x.device)
        if reason is not None:
            return reason
        if packed.activations is not None:
            return QUANTIZED_INPUTS
        if x.dtype not in DTYPES:
            return f"activations are {x.dtype}, not bfloat16 or float16"
        return why_not_decoded(packed)

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if TWO_BITS in packed.tensors or twin_format(packed.format, packed.shape[1]) is None:
            return packed
        two_bits = pack_stream(unpack_digits(packed.tensors["codes"], packed.shape[1], 3, -1), 2, -2)
        prepared = Gpu().prepare(twin(replace(packed, tensors={**packed.tensors, TWO_BITS: two_bits})))
        derived = {TWO_BITS: two_bits, ARRIVED: prepared.tensors[ARRIVED]} if ARRIVED in prepared.tensors else {}
        return replace(packed, tensors={**packed.tensors, **derived})

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        if TWO_BITS in packed.tensors:
            return Gpu().linear(x, twin(packed), bias)
        outs, columns = packed.shape
        found = runs.scheme(packed.format, columns)
        assert not isinstance(found, str), found
        rows = x.numel() // columns
        if not 0 < rows <= runs.MOST_ROWS:
            return torch.nn.functional.linear(x, runs.dequantize(packed, x.dtype, found), bias)
        flat = x.reshape(rows, columns).contiguous()
        flat = flat if flat.data_ptr() % 16 == 0 else flat.clone()
        bias = None if bias is None else bias.contiguous()
        y = runs.multiply_few(flat, packed, bias, found, runs.best(packed.shape, rows))
        return y.reshape(*x.shape[:-1], outs)


def why_not_decoded(packed: PackedWeight) -> str | None:
    """Why the kernels cannot read this weight, or None."""
    if packed.layout != BITS.name or len(packed.shape) != 2:
        return f"layout {packed.layout} of shape {tuple(packed.shape)}"
    found = runs.scheme(packed.format, matrix_shape(packed.shape)[1])
    return found if isinstance(found, str) else runs.unaligned(packed, found)


@lru_cache(maxsize=256)
def twin_format(format: Format, columns: int) -> Format | None:
    """The integers of two bits that have the same values and scales, if the kernels of integers can read them."""
    if not isinstance(format, Signs) or radix(format) is None or format.per_tensor:
        return None
    where = f"g{format.group_size}" if format.group_size else "channel"
    found = parse_format(f"int2-{where}-{format.scale_type}")
    return None if isinstance(stream.scheme(found, columns), str) else found


def twin(packed: PackedWeight) -> PackedWeight:
    """A prepared ternary weight as the integers of two bits that it equals: its -1, 0 and 1 are their codes 1, 2, 3."""
    format = twin_format(packed.format, packed.shape[1])
    assert format is not None, packed.format
    tensors = {"codes": packed.tensors[TWO_BITS], "scale": packed.tensors["scale"]}
    if ARRIVED in packed.tensors:
        tensors[ARRIVED] = packed.tensors[ARRIVED]
    return replace(packed, format=format, tensors=tensors)
