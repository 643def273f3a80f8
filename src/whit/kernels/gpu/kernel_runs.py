"""The dispatch table's row for k-quants, ternary and binary on NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.kernels.base import QUANTIZED_INPUTS
from whit.kernels.gpu import many, runs, runs_many, runs_row
from whit.kernels.gpu.again import Prepared
from whit.kernels.gpu.kernel import DTYPES, why_not
from whit.kernels.gpu.launches import ARRIVED, Call, counters, device_of
from whit.kernels.gpu.tiled import has_wgmma
from whit.layouts import BITS
from whit.tensor import PackedWeight, matrix_shape


@dataclass(frozen=True)
class GpuRuns:
    """Weights whose scales belong to runs of columns, in bfloat16 and float16, on compute capability 8.0 and newer.

    Up to 16 rows meet weights that are decoded in registers; on Hopper all rows meet ggml's types so, where that was
    faster. For others the matrix is dequantized for torch's product.
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
        if isinstance(packed, Prepared) or (packed.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return packed  # what a graph's recording makes is the graph's
        derived = {} if runs_row.why_not(packed) is not None else {ARRIVED: counters(packed)}
        tensors = {**packed.tensors, **derived}
        return Prepared(packed.layout, packed.format, packed.shape, tensors, deterministic=packed.deterministic)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        outs, columns = packed.shape
        found = runs.scheme(packed.format, columns)
        assert not isinstance(found, str), found
        rows = x.numel() // columns
        bias = None if bias is None else bias.contiguous()
        if rows and isinstance(packed, Prepared) and (again := packed.again(x, bias, False)) is not None:
            return again
        call = decoded(x.reshape(rows, columns), packed, bias, found) if rows else None
        if call is None:
            return torch.nn.functional.linear(x, runs.dequantize(packed, x.dtype, found), bias)
        if isinstance(packed, Prepared):
            packed.keep(call, bias, False)
        return call.start()[0].reshape(*x.shape[:-1], outs)


def decoded(x: Tensor, packed: PackedWeight, bias: Tensor | None, found: runs.Scheme) -> Call | None:
    """The product of x (rows, columns) with codes that are decoded on the way; None for too many rows."""
    rows, one = len(x), row_cut(x, packed)
    more = None if one else many_cut(x, packed)
    if one is None and more is None and rows > runs.MOST_ROWS:
        return None
    x = x.contiguous()
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    if one is not None:
        return runs_row.call(x, packed, bias, one)
    if more is not None:
        return runs_many.call(x, packed, bias, more)
    return runs.call(x, packed, bias, found, runs.best(packed.shape, rows))


def row_cut(x: Tensor, packed: PackedWeight) -> runs_row.Config | None:
    """How runs_row.cu takes x (rows, columns); None where it does not."""
    if not has_wgmma(x.device) or runs_row.why_not(packed) is not None:
        return None  # its shared memory is Hopper's
    return runs_row.best(packed, len(x))


def many_cut(x: Tensor, packed: PackedWeight) -> many.Config | None:
    """How many.cu takes x (rows, columns); None where it does not."""
    if not has_wgmma(x.device) or runs_many.why_not(packed) is not None:
        return None
    shape = packed.shape[0], packed.shape[1]
    return runs_many.best(runs_row.kind_of(packed), shape, len(x), device_of(x))


def why_not_decoded(packed: PackedWeight) -> str | None:
    """Why the kernels cannot read this weight, or None."""
    if packed.layout != BITS.name or len(packed.shape) != 2:
        return f"layout {packed.layout} of shape {tuple(packed.shape)}"
    found = runs.scheme(packed.format, matrix_shape(packed.shape)[1])
    return found if isinstance(found, str) else runs.unaligned(packed, found)
