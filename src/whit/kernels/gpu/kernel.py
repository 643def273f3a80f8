"""The row of the dispatch table for NVIDIA GPUs: streamed for few rows, tiled for more, dequantized for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from whit.formats import parse_format
from whit.kernels.base import QUANTIZED_INPUTS
from whit.kernels.gpu import digits, few, halves, many, narrow, nvrtc, slab, stream, tiled, tuned
from whit.kernels.gpu.again import Prepared
from whit.kernels.gpu.dequantize import dequantize
from whit.kernels.gpu.launches import ARRIVED, AT_ONCE, WAYS, Call, by_slab, device_of, multiply_tiled, row_by_few
from whit.kernels.gpu.scales import storage
from whit.tensor import PackedWeight

OLDEST = (8, 0)
DTYPES = (torch.bfloat16, torch.float16)
FULL = 4  # bits from which on a token's products all go through few.cu: among digits.cu's, which leave it little of the
# first cache, it is slower than those are faster (results/decode_gpu.md)
LARGE = 8192  # outs of a weight from which on it gains nothing by sharing a launch


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
        fused = streams(packed)
        return fused if self.invariant else None

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if ARRIVED in packed.tensors or (streams(packed) is not None and narrow_scheme(packed) is None):
            return packed
        arrived = torch.zeros(-(-packed.shape[0] // 16), dtype=torch.int32, device=packed.device)
        derived = {ARRIVED: arrived} | ({} if self.invariant else halves_for(packed))
        return Prepared(packed.layout, packed.format, packed.shape, {**packed.tensors, **derived})

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            return product(x, packed, bias, self.invariant)
        keys, tensors = ",".join(packed.tensors), list(packed.tensors.values())
        result: Tensor = torch.ops.whit.gpu_linear(x, tensors, bias, keys, str(packed.format), self.invariant)
        return result


def streams(packed: PackedWeight) -> str | None:
    """Why the fused kernel cannot read this weight, or None."""
    found = stream.scheme(packed.format, packed.shape[1])
    if isinstance(found, str):
        return found
    codes = packed.tensors["codes"]
    return None if codes.is_contiguous() and codes.data_ptr() % 16 == 0 else "the codes do not begin at 16 bytes"


def halves_for(packed: PackedWeight) -> dict[str, Tensor]:
    """Its absmax in 16 bits, an eighteenth more memory, where a kernel on its device reads that; not in a recording."""
    absmax = packed.tensors.get("absmax")
    if absmax is None or absmax.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return {}
    major = torch.cuda.get_device_capability(absmax.device)[0]
    shape = packed.shape[0], packed.shape[1]
    return halves.halved(absmax) if tuned.reads_halves(scheme_of(packed), shape, major) else {}


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None, invariant: bool = False) -> Tensor:
    """x (..., columns) through the weight, by whichever kernel is fastest, or by rows alone where `invariant`."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows and isinstance(packed, Prepared) and (again := packed.again(x, bias, invariant)) is not None:
        return again
    chosen = chosen_for(x, rows, packed, invariant) if rows else None
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


def chosen_for(x: Tensor, rows: int, packed: PackedWeight, invariant: bool) -> tuple[str, stream.Scheme, Any] | None:
    """The way of a product, how it reads the weight and its cut; None: the weight is dequantized."""
    columns, where = x.shape[-1], device_of(x)
    if streams(packed) is None:
        scheme = scheme_of(packed)
        if rows == 1 and not invariant and (row := row_cut([packed], scheme, x)):
            return "digits", scheme, row
        short = halves.read_as(packed, scheme, x.dtype) if slab.aligned(packed) else None
        way, cut = plan(scheme, (packed.shape[0], columns), rows, where, invariant, short)
        if cut is not None:
            read = short if way == "slab" else widened(scheme, rows, columns, x) if way == "tiled" else scheme
            assert read is not None
            return way, read, cut
    side = narrow_scheme(packed)
    found = narrow.plan(side, (packed.shape[0], columns), rows, where) if side else None
    return (found[0], side, found[1]) if side and found else None


def widened(scheme: stream.Scheme, rows: int, columns: int, x: Tensor) -> stream.Scheme:
    """How tiled.cu reads a weight on the device of x: it was measured on Hopper with groups side by side."""
    return tiled.widened(scheme, rows, columns) if device_of(x)[0] == tuned.HOPPER else scheme


def narrow_scheme(packed: PackedWeight) -> stream.Scheme | None:
    """How a weight is read whose groups are narrower than a step; None where they are not, or it lies unaligned."""
    codes = packed.tensors["codes"]
    lies = codes.is_contiguous() and codes.data_ptr() % 16 == 0
    return narrow.scheme(packed.format, packed.shape[1]) if lies else None


Cut: TypeAlias = few.Config | many.Config | slab.Config | stream.Config | tiled.Config | None


@lru_cache(maxsize=4096)
def plan(
    scheme: stream.Scheme,
    shape: tuple[int, int],
    rows: int,
    where: tuned.Device,
    invariant: bool,
    alone: stream.Scheme | None = None,
) -> tuple[str, Cut]:
    """The way for x (rows, columns) and a weight of `shape` (outs, columns), and how it is cut; None: dequantize.

    `alone`: one weight whose tensors lie aligned, which is what slab.cu takes, and how that reads it.
    """
    if alone and not invariant and (slabs := tuned.best_slab(alone, shape, rows, where)):
        return "slab", slabs
    best_many = tuned.best_invariant if invariant else tuned.best_many
    if most := best_many(scheme, shape, rows, where):
        return "many", most
    if not invariant and (cut := tuned.best_few(scheme, shape, rows, where)):
        return "few", cut
    way = "stream" if invariant else tuned.route(scheme, shape, rows, where)
    if way == "stream":
        return way, stream.fitted(tuned.best(scheme, shape, rows, where, invariant), scheme, shape[1])
    if way == "tiled":
        wide = tiled.widened(scheme, rows, shape[1]) if where[0] == tuned.HOPPER else scheme
        return way, tiled.fitted(tuned.best_tiled(wide, shape, rows, where), wide, shape[1])
    return way, None


def products(x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x (..., columns) through several weights: in one launch where they are alike and the rows few."""
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    found = {stream.scheme(weight.format, columns) for weight in packed}
    scheme = found.pop()
    if found or isinstance(scheme, str) or not rows or any(streams(weight) is not None for weight in packed):
        return [product(x, weight, bias) for weight, bias in zip(packed, biases, strict=True)]
    if rows == 1 and scheme.storage.bits < FULL and (row := row_cut(packed, scheme, x)):
        return filled(WAYS["digits"](aligned(x, 1), packed, biases, scheme, row), x)
    shape = sum(weight.shape[0] for weight in packed), columns
    short = read_alike(packed, scheme, x.dtype)
    if short and (slabs := shared_cut(short, shape, rows, device_of(x))):
        return filled(by_slab(aligned(x, rows), packed, biases, short, slabs), x)
    way, cut = plan(scheme, shape, rows, device_of(x), False)
    if way not in AT_ONCE or all(apart(weight, rows, device_of(x), x.dtype) for weight in packed):
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
    found = {stream.scheme(weight.format, columns) for weight in packed}
    scheme = found.pop()
    if found or isinstance(scheme, str) or any(streams(weight) is not None for weight in packed):
        return None
    if scheme.storage.bits < FULL and row_cut(packed, scheme, x):
        return None
    shape, short = (sum(weight.shape[0] for weight in packed), columns), read_alike(packed, scheme, x.dtype)
    if short and shared_cut(short, shape, 1, device_of(x)):
        return None
    cut = plan(scheme, shape, 1, device_of(x), False)[1]
    if not isinstance(cut, few.Config) or not few.takes(scheme, cut, columns) or x.data_ptr() % 16:
        return None
    return row_by_few(x, packed, biases, scheme, cut, ends, y).start()


def row_cut(packed: Sequence[PackedWeight], scheme: stream.Scheme, x: Tensor) -> digits.Cut | None:
    """How one row of x and weights of a scheme go through digits.cu; None where another kernel takes them.

    float16 has run on the CPU's stand-in only.
    """
    where, shape = device_of(x), (sum(weight.shape[0] for weight in packed), x.shape[-1])
    config = tuned.best_digits(scheme, shape, where)
    if config is None or x.dtype != torch.bfloat16 or not all(slab.aligned(weight) for weight in packed):
        return None
    return digits.fit(scheme, config, shape[1], digits.tiles_of(packed), where[1])


@lru_cache(maxsize=1024)
def shared_cut(scheme: stream.Scheme, shape: tuple[int, int], rows: int, where: tuned.Device) -> slab.Config | None:
    """How slab.cu is cut for weights that share an input, `shape` with all their outs; None: other ways are faster."""
    return tuned.best_slab(scheme, shape, rows, where, shared=True)


def read_alike(packed: Sequence[PackedWeight], scheme: stream.Scheme, dtype: torch.dtype) -> stream.Scheme | None:
    """How slab.cu reads weights of a scheme, if it can, and all of them alike."""
    found = {halves.read_as(weight, scheme, dtype) if slab.aligned(weight) else None for weight in packed}
    return found.pop() if len(found) == 1 else None


def apart(packed: PackedWeight, rows: int, where: tuned.Device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a weight is so large that for several rows a launch of its own is faster than a shared one.

    Measured by decoding 16 texts with a Llama-3-8B-shaped model on an H100 (results/decode_gpu.md).
    """
    if rows == 1 or packed.shape[0] < LARGE or not slab.aligned(packed):
        return False
    read = halves.read_as(packed, scheme_of(packed), dtype)
    return tuned.best_slab(read, (packed.shape[0], packed.shape[1]), rows, where) is not None


def aligned(x: Tensor, rows: int) -> Tensor:
    """x as contiguous rows that begin where sixteen bytes can be read at a time."""
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    return flat if flat.data_ptr() % 16 == 0 else flat.clone()


def scheme_of(packed: PackedWeight) -> stream.Scheme:
    """The scheme of a weight that the fused kernels can read."""
    scheme = stream.scheme(packed.format, packed.shape[1])
    assert not isinstance(scheme, str)
    return scheme


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
