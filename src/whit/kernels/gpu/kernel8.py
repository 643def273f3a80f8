"""The row of the dispatch table for int8 activations on Hopper: LLM.int8() and W8A8 in one to three launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from whit.capabilities import product_dtype
from whit.kernels import int8 as reference
from whit.kernels.gpu import int8, int8_row, int8_rows, int8_thin, int8_ways
from whit.kernels.gpu.kernel import DTYPES, why_not
from whit.kernels.gpu.tiled import has_wgmma
from whit.layouts import BITS
from whit.tensor import Activated, PackedWeight

ROW_SCALE, ROW_SUMS = "row_scale", "row_sums"  # derived: float32 and int32 (outs,)


def why_not_hopper(packed: PackedWeight, x: Tensor) -> str | None:
    """Why no kernel for quantized activations on Hopper is for this weight on this device, or None."""
    if packed.activations is None:
        return "activations are not quantized"
    reason: str | None = why_not(x.device)
    if reason is not None:
        return reason
    return None if has_wgmma(x.device) else "the device is not of compute capability 9.0"


@dataclass(frozen=True)
class Gpu8:
    """int8 activations, however they are quantized per row or tensor, in bfloat16 or float16, on Hopper."""

    name: ClassVar[str] = "gpu-int8"

    def supports(self, packed: PackedWeight, x: Tensor) -> str | None:
        how, reason = packed.activations, why_not_hopper(packed, x)
        if how is None or reason is not None:
            return reason
        if x.dtype not in DTYPES or how.dtype != torch.int8:
            return f"activations are {x.dtype}, to be multiplied as {how.dtype}"
        plain = how.granularity != "group" and not how.exact
        if not plain or product_dtype(packed.format) != torch.int8 or packed.format.bits != 8:
            return f"{packed.format} with activations {how} is no product of bytes"
        if packed.layout != BITS.name or len(packed.shape) != 2:
            return f"layout {packed.layout} of shape {tuple(packed.shape)}"
        return unaligned(packed)

    def prepare(self, packed: PackedWeight) -> PackedWeight:
        if ROW_SCALE in packed.tensors or unaligned(packed) is not None:
            return packed
        derived = {ROW_SCALE: row_scale(packed)}
        if is_shifted(packed):
            derived[ROW_SUMS] = row_sums(packed)
        tensors = {**packed.tensors, **derived}
        return PackedWeight(packed.layout, packed.format, packed.shape, tensors, activations=packed.activations)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        outs, columns = packed.shape
        flat = x.reshape(-1, columns).contiguous()
        flat = flat if flat.data_ptr() % 16 == 0 else flat.clone()
        y = torch.empty(len(flat), outs, dtype=x.dtype, device=x.device)
        if len(flat):
            product(flat, packed, bias, y)
        return y.reshape(*x.shape[:-1], outs)


def product(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, y: Tensor, config: int8_ways.Way | None = None
) -> None:
    """Fill y (rows, outs), contiguous x (rows, columns); cut as `config` says, or by the way that is best here."""
    (outs, columns), how = packed.shape, packed.activations
    processors, device = _device(x.device.index)
    scale = packed.tensors.get(ROW_SCALE)
    sums = packed.tensors.get(ROW_SUMS)
    if sums is None and is_shifted(packed):
        sums = row_sums(packed)
    weight = int8.Weight(
        packed.tensors["codes"],
        row_scale(packed) if scale is None else scale,
        None if bias is None else bias.contiguous(),
        sums,
    )
    assert how is not None
    found = config or int8_ways.way(outs, columns, len(x), how.threshold > 0, processors, device)
    if isinstance(found, int8.Config):
        return int8.multiply(quantized(x, packed), weight, y, found)
    if isinstance(found, int8_thin.Thin) and sums is None:
        return int8_thin.multiply_thin(quantized(x, packed), weight, y, found)
    if isinstance(found, int8_thin.Thin) or not is_plain(how):
        cut = int8_ways.fitted(int8_ways.FEWEST if len(x) <= 64 else int8_ways.MANY, outs, columns, len(x), processors)
        return int8.multiply(quantized(x, packed), weight, y, cut)
    int8_row.multiply_row(x, weight, y, how.threshold, found)


def is_plain(how: Activated) -> bool:
    """Whether the kernels quantize such rows themselves: each by its own largest |x|."""
    return how.kind == "dynamic" and how.symmetric and how.granularity == "token"


def quantized(x: Tensor, packed: PackedWeight) -> int8.Rows:
    """x (rows, columns) as the packed weight's activations say."""
    how = packed.activations
    assert how is not None
    if is_plain(how):
        return int8_rows.quantize(x, how.threshold)
    if how.kind == "static":
        rows = reference.quantize_static(x, packed.tensors["input_scale"], packed.tensors.get("input_zero_point"))
    else:
        rows = reference.quantize_rows(x, how.granularity == "tensor", how.symmetric)
    zero = None if rows.zero_point is None else rows.zero_point.expand(len(x), 1).contiguous()
    scale = rows.scale.expand(len(x), 1).contiguous()
    return int8.Rows(rows.codes, scale, rows.codes.sum(1, dtype=torch.int32) * 128, zero)


def is_shifted(packed: PackedWeight) -> bool:
    """Whether rows have zero points."""
    return packed.activations is not None and not packed.activations.symmetric


def row_scale(packed: PackedWeight) -> Tensor:
    """float32 (outs,): a weight is its code times its row's."""
    params = {key: packed.tensors[key] for key in packed.format.param_specs(*packed.shape)}
    scale: Tensor = packed.format.row_scale(params)  # type: ignore[attr-defined]
    return scale.expand(packed.shape[0], 1).reshape(-1).contiguous()


def row_sums(packed: PackedWeight) -> Tensor:
    """int32 (outs,): the sums of the codes of each row."""
    return packed.tensors["codes"].sum(1, dtype=torch.int32) - 128 * packed.shape[1]


def unaligned(packed: PackedWeight) -> str | None:
    """Why the kernels cannot read this weight, or None."""
    codes, columns = packed.tensors["codes"], packed.shape[1]
    if columns % 16 or columns > int8_rows.MOST_COLUMNS:
        return f"{columns} columns, not a multiple of 16 up to {int8_rows.MOST_COLUMNS}"
    return None if codes.is_contiguous() and codes.data_ptr() % 16 == 0 else "the codes do not begin at 16 bytes"


@lru_cache(maxsize=32)
def _device(device: int) -> tuple[int, str]:
    """Its multiprocessors, and its name."""
    found = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count), found.name
