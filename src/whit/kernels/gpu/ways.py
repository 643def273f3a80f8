"""Which kernel a product takes on an NVIDIA GPU, how it reads the weight, and how the work is cut.

By what was measured (tuned.py): digits.cu, slab.cu, many.cu or few.cu for few rows, stream.cu where each row must be
the same bits whatever is beside it, tiled.cu for more; none of them where dequantizing first is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from whit.kernels.gpu import digits, few, halves, many, narrow, slab, stream, tiled, tuned
from whit.kernels.gpu.launches import device_of
from whit.tensor import PackedWeight

LARGE = 8192  # outs of a weight from which on it gains nothing by sharing a launch


def streams(packed: PackedWeight) -> str | None:
    """Why the fused kernel cannot read this weight, or None."""
    found = stream.scheme(packed.format, packed.shape[1])
    if isinstance(found, str):
        return found
    codes = packed.tensors["codes"]
    return None if codes.is_contiguous() and codes.data_ptr() % 16 == 0 else "the codes do not begin at 16 bytes"


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
            read = short if way == "slab" else widened(scheme, rows, columns, where) if way == "tiled" else scheme
            assert read is not None
            return way, read, cut
    side = narrow_scheme(packed)
    found = narrow.plan(side, (packed.shape[0], columns), rows, where) if side else None
    return (found[0], side, found[1]) if side and found else None


def widened(scheme: stream.Scheme, rows: int, columns: int, where: tuned.Device) -> stream.Scheme:
    """How tiled.cu reads a weight on a device: it was measured on Hopper with groups side by side."""
    return tiled.widened(scheme, rows, columns) if where[0] == tuned.HOPPER else scheme


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
        wide = widened(scheme, rows, shape[1], where)
        return way, tiled.fitted(tuned.best_tiled(wide, shape, rows, where), wide, shape[1])
    return way, None


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


def shared_scheme(packed: Sequence[PackedWeight]) -> stream.Scheme | None:
    """The one scheme of weights of the same input; None where they have several, or one cannot be read."""
    found = {stream.scheme(weight.format, weight.shape[1]) for weight in packed}
    scheme = found.pop()
    if found or isinstance(scheme, str) or any(streams(weight) is not None for weight in packed):
        return None
    return scheme


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


def scheme_of(packed: PackedWeight) -> stream.Scheme:
    """The scheme of a weight that the fused kernels can read."""
    scheme = stream.scheme(packed.format, packed.shape[1])
    assert not isinstance(scheme, str)
    return scheme
