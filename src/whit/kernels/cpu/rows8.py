"""Activations in 8 bits: x quantized in one pass, and its products with packed weights in exact int32.

    y_mn = sum_g s_ng (sum_u t_mu (sum_{k in u} q_mk level_nk)) - sum_g o_ng (sum_u t_mu sum_{k in u} q_mk)

q, t are the codes and scales of x in groups u of 32 columns, or of a row; s and o = s zero_point those of the weight in
its groups g. A weight's levels are its codes, or small integers in a table times one unit, to
which a codebook's are rounded (`activated.product_format`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from whit.formats.codebook import EXACT, byte_levels
from whit.kernels.activated import product_format
from whit.kernels.cpu.binding import ISAS, ISAS8, TYPES, Library, RowsPlan, check_ran
from whit.kernels.cpu.weight import CpuWeight, is_consecutive, level_table, run_size
from whit.tensor import Format

GROUP = 32  # columns of x that share a scale
PADDED = 64
FEW = 3  # up to here weights stream past rows of x; more rows share panels of decoded bytes
WIDTHS = (2, 3, 4, 5, 6, 8)
ROW_SUMS = "row_sums"  # a derived tensor, int32 (out,): the levels of a row, for activations with zero points


@dataclass(frozen=True)
class Rows8:
    """x as int8 codes (count, stride), float32 scales and int32 sums of codes (count, groups), int32 zero (count,)."""

    codes: Tensor
    scale: Tensor
    sums: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class Levels:
    """level = (stored - shift) unit, where stored is the code, or table[code]."""

    table: bytes | None
    shift: int
    unit: float


def padded(columns: int) -> int:
    """Columns up to whole vectors."""
    return -(-columns // PADDED) * PADDED


def quantize_rows(x: Tensor, grouped: bool, library: Library, isa: str | None = None) -> Rows8:
    """x (count, columns), contiguous: codes = round(x 127 / max|x|), scale = max|x| / 127 per row or 32 columns."""
    count, columns = x.shape
    stride = padded(columns)
    groups = stride // GROUP if grouped else 1
    rows = Rows8(
        torch.empty(count, stride, dtype=torch.int8),
        torch.empty(count, groups),
        torch.empty(count, groups, dtype=torch.int32),
    )
    status = library.quantize8(
        x.data_ptr(), count, columns, TYPES[x.dtype], rows.codes.data_ptr(), rows.scale.data_ptr(),
        rows.sums.data_ptr(), stride, groups, library.parallel, _number(isa, library), torch.get_num_threads(),
    )  # fmt: skip
    check_ran(status)
    return rows


def linear(
    x: Tensor,
    grouped: bool,
    weight: CpuWeight,
    levels: Levels,
    bias: Tensor | None,
    library: Library,
    isa: str | None = None,
) -> Tensor:
    """`multiply` of `quantize_rows` in one call: x (count, columns), contiguous -> (count, out_features) in x.dtype.

    `levels` are those of the weight's `product_format`.
    """
    y = x.new_empty(len(x), weight.shape[0])
    status = library.linear8(
        weight.address, x.data_ptr(), len(x), grouped, None if bias is None else bias.data_ptr(), y.data_ptr(),
        TYPES[x.dtype], levels.table, levels.shift, levels.unit, FEW, _number(isa, library), torch.get_num_threads(),
    )  # fmt: skip
    check_ran(status)
    return y


def round_groups(x: Tensor, dtype: torch.dtype, library: Library) -> Tensor:
    """int8.rounded_groups of x (count, columns), contiguous, rounded once more to `dtype`."""
    count, columns = x.shape
    y = torch.empty(count, columns, dtype=dtype)
    status = library.round(
        x.data_ptr(), count, columns, TYPES[x.dtype], GROUP, y.data_ptr(), TYPES[dtype], library.parallel,
        ISAS.index(library.isas[-1]), torch.get_num_threads(),
    )  # fmt: skip
    check_ran(status)
    return y


def multiply(
    rows: Rows8, weight: CpuWeight, bias: Tensor | None, dtype: torch.dtype, library: Library, isa: str | None = None
) -> Tensor:
    """The product (count, out_features) in `dtype`; `bias` in it too. `weight` as `levels_of` allows."""
    levels = levels_of(product_format(weight))
    assert not isinstance(levels, str)
    count, out = len(rows.codes), weight.shape[0]
    y = torch.empty(count, out, dtype=dtype)
    row_sums = None if rows.zero is None else weight.tensors[ROW_SUMS].data_ptr()
    plan = RowsPlan(
        codes=rows.codes.data_ptr(), scale=rows.scale.data_ptr(), sums=rows.sums.data_ptr(), count=count,
        zero=None if rows.zero is None else rows.zero.data_ptr(), stride=rows.codes.shape[1],
        groups=rows.scale.shape[1],
    )  # fmt: skip
    status = library.product8(
        weight.address, ctypes.addressof(plan), row_sums, None if bias is None else bias.data_ptr(), y.data_ptr(),
        TYPES[dtype], levels.table, levels.shift, levels.unit, FEW, _number(isa, library), torch.get_num_threads(),
    )  # fmt: skip
    check_ran(status)
    return y


@cache
def levels_of(format: Format) -> Levels | str:
    """The levels of a format as integers times a unit, or why they are none."""
    if format.bits not in WIDTHS:
        return f"codes of {format.bits} bits are not multiplied as bytes"
    if run_size(format) % GROUP:
        return f"groups of {run_size(format)} columns are not a multiple of {GROUP}"
    levels = level_table(format)
    largest = levels.abs().max()
    step = 1.0 if is_consecutive(format) else ((levels[-1] - levels[0]) / (len(levels) - 1)).item()
    shift = -round(levels[0].item() / step) if step > 0 else 0
    line = (torch.arange(len(levels)) - shift) * step
    if bool(((line - levels).abs() <= EXACT * largest).all()):
        return Levels(None, shift, step)
    if format.bits > 4:
        return f"the levels of {format} are not integers"
    integers, unit = byte_levels(levels.tolist())
    if bool(((torch.tensor(integers) * unit - levels).abs() > EXACT * largest).any()):
        return f"the levels of {format} are not multiples of one number"
    shift = -min(integers)
    return Levels(bytes([i + shift for i in integers] * (16 >> format.bits)), shift, unit)


def _number(isa: str | None, library: Library) -> int:
    return ISAS8.index(isa or library.isas8[-1])
