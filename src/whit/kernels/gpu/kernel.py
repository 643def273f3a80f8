"""The row of the dispatch table for NVIDIA GPUs; ways.py says which of the kernels a product takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats import parse_format
from whit.kernels.base import QUANTIZED_INPUTS
from whit.kernels.gpu import few, halves, nvrtc, tuned, ways
from whit.kernels.gpu.again import Prepared
from whit.kernels.gpu.dequantize import dequantize
from whit.kernels.gpu.launches import (
    ARRIVED,
    AT_ONCE,
    WAYS,
    Call,
    by_slab,
    counters,
    device_of,
    multiply_tiled,
    row_by_few,
)
from whit.kernels.gpu.scales import storage
from whit.tensor import PackedWeight

OLDEST = (8, 0)
DTYPES = (torch.bfloat16, torch.float16)
FULL = 4  # bits from which on a token's products all go through few.cu: among digits.cu's, which leave it little of the
# first cache, it is slower than those are faster (results/decode_gpu.md)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    return _why_not(device)


@lru_cache(maxsize=32)
def _why_not(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the device is {device.type}"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"compute capability {torch.cuda.get_device_capability(device)} is below {OLDEST}"
    return nvrtc.missing()


@dataclass(frozen=True)
class Gpu:
    """bfloat16 and float16 activations with integers of 1 to 8 bits and tables, on compute capability 8.0 and newer.

    `invariant`: each row's result is the same bits whatever rows are beside it (always the fused kernel, cut one way).
    """

    invariant: bool = False

    @property
    def name(self) -> str:
        return "gpu-invariant" if self.invariant else "gpu"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        reason: str | None = why_not(x.device)
        if reason is not None:
            return reason
        if packed.activations is not None:
            return QUANTIZED_INPUTS
        if x.dtype not in DTYPES:
            return f"activations are {x.dtype}, not bfloat16 or float16"
        if packed.layout != "bits" or len(packed.shape) != 2:
            return f"layout {packed.layout} of shape {tuple(packed.shape)}"
        stored = storage(packed.format)
        if isinstance(stored, str):
            return stored
        fused = ways.streams(packed)
        return fused if self.invariant else None

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if ARRIVED in packed.tensors or (ways.streams(packed) is not None and ways.narrow_scheme(packed) is None):
            return packed
        derived = {ARRIVED: counters(packed)} | ({} if self.invariant else halves_for(packed))
        return Prepared(packed.layout, packed.format, packed.shape, {**packed.tensors, **derived})

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            return product(x, packed, bias, self.invariant)
        keys, tensors = ",".join(packed.tensors), list(packed.tensors.values())
        result: Tensor = torch.ops.whit.gpu_linear(x, tensors, bias, keys, str(packed.format), self.invariant)
        return result


def halves_for(packed: PackedWeight) -> dict[str, Tensor]:
    """Its absmax in 16 bits, an eighteenth more memory, where a kernel on its device reads that; not in a recording."""
    absmax = packed.tensors.get("absmax")
    if absmax is None or absmax.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return {}
    major = torch.cuda.get_device_capability(absmax.device)[0]
    shape = packed.shape[0], packed.shape[1]
    return halves.halved(absmax) if tuned.reads_halves(ways.scheme_of(packed), shape, major) else {}


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None, invariant: bool = False) -> Tensor:
    """x (..., columns) through the weight, by whichever kernel is fastest, or by rows alone where `invariant`."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows and isinstance(packed, Prepared) and (again := packed.again(x, bias, invariant)) is not None:
        return again
    chosen = ways.chosen_for(x, rows, packed, invariant) if rows else None
    if chosen is None:
        stored = storage(packed.format)
        assert not isinstance(stored, str)
        return torch.nn.functional.linear(x, dequantize(packed, x.dtype, stored), bias)
    way, read, cut = chosen
    if way == "tiled":
        return multiply_tiled(aligned(x, rows), packed, bias, read, cut).reshape(*x.shape[:-1], -1)
    call = WAYS[way](aligned(x, rows), [packed], [bias], read, cut)
    if isinstance(packed, Prepared):
        packed.keep(call, bias, invariant)
    return call.start()[0].reshape(*x.shape[:-1], -1)


def products(x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x (..., columns) through several weights: in one launch where they are alike and the rows few."""
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    scheme = ways.shared_scheme(packed)
    if scheme is None or not rows:
        return [product(x, weight, bias) for weight, bias in zip(packed, biases, strict=True)]
    if rows == 1 and scheme.storage.bits < FULL and (row := ways.row_cut(packed, scheme, x)):
        return filled(WAYS["digits"](aligned(x, 1), packed, biases, scheme, row), x)
    shape = sum(weight.shape[0] for weight in packed), columns
    short = ways.read_alike(packed, scheme, x.dtype)
    if short and (slabs := ways.shared_cut(short, shape, rows, device_of(x))):
        return filled(by_slab(aligned(x, rows), packed, biases, short, slabs), x)
    way, cut = ways.plan(scheme, shape, rows, device_of(x), False)
    if way not in AT_ONCE or all(ways.apart(weight, rows, device_of(x), x.dtype) for weight in packed):
        return [product(x, weight, bias) for weight, bias in zip(packed, biases, strict=True)]
    return filled(WAYS[way](aligned(x, rows), packed, biases, scheme, cut), x)


def filled(call: Call, x: Tensor) -> list[Tensor]:
    """What a call for the rows of x (..., columns) will have filled: (..., outs) each."""
    return [y.reshape(*x.shape[:-1], -1) for y in call.start()]


def row_through(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None], ends: few.Ends, y: Tensor | None = None
) -> list[Tensor] | None:
    """x (1, columns) through weights that share it, as `row_by_few` has it; None where few.cu does not take them."""
    columns = x.shape[-1]
    scheme = ways.shared_scheme(packed)
    if scheme is None or (scheme.storage.bits < FULL and ways.row_cut(packed, scheme, x)):
        return None
    shape, short = (sum(weight.shape[0] for weight in packed), columns), ways.read_alike(packed, scheme, x.dtype)
    if short and ways.shared_cut(short, shape, 1, device_of(x)):
        return None
    cut = ways.plan(scheme, shape, 1, device_of(x), False)[1]
    if not isinstance(cut, few.Config) or not few.takes(scheme, cut, columns) or x.data_ptr() % 16:
        return None
    return row_by_few(x, packed, biases, scheme, cut, ends, y).start()


def aligned(x: Tensor, rows: int) -> Tensor:
    """x as contiguous rows that begin where sixteen bytes can be read at a time."""
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    return flat if flat.data_ptr() % 16 == 0 else flat.clone()


def linear_op(x: Tensor, tensors: list[Tensor], bias: Tensor | None, keys: str, spec: str, invariant: bool) -> Tensor:
    """`product` for torch.compile: the packed weight as its tensors, their names and the format's name."""
    named = dict(zip(keys.split(","), tensors, strict=True))
    shape = (named["codes"].shape[0], x.shape[-1])
    return product(x, PackedWeight("bits", parse_format(spec), shape, named), bias, invariant)


_linear = torch.library.custom_op("whit::gpu_linear", linear_op, mutates_args=(), device_types="cuda")


@_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, keys: str, spec: str, invariant: bool) -> Tensor:
    outs = tensors[keys.split(",").index("codes")].shape[0]
    return x.new_empty(*x.shape[:-1], outs)
