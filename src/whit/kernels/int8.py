"""Products of int8 activations and int8 weights: the torch functions that define correct.

    codes, scale[, zero_point] = quantize_rows(x)          x (rows, in) ~ (codes - zero_point) scale
    sums = int_product(codes, weight)                      exact int32 (rows, out), as torch._int_mm
    y = (sums - zero_point sum_j weight_ij) scale row_scale_i + bias        in float32, then rounded once to x.dtype

All are pure, wait for nothing on a device, have no shapes that depend on data, and can be traced. Rounding is to the
nearest, halves to even. A row that holds a NaN or an infinity comes out as NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

LIMIT = 127.0
GROUP = 32  # columns that share a scale in activations `int8-g32`


class Rows(NamedTuple):
    """Quantized activations: int8 codes (rows, in), float32 scale (rows, 1) or (1, 1), int32 zero_point like it.

    The zero point is None where it is 0 throughout.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def quantize_rows(x: Tensor, per_tensor: bool = False, symmetric: bool = True) -> Rows:
    """Dynamic: x (rows, in) by a scale per row, or one for all. A row of zeros has scale 0 and codes 0.

    Symmetric: codes = round(x 127 / max|x|), scale = max|x| / 127. Otherwise the range is stretched to hold 0:
    scale = (max - min) / 255, zero_point = round(-128 - min / scale).
    """
    wide, one = x.to(torch.float32), per_tensor and len(x) > 0  # no rows have no largest one
    if symmetric:
        absmax = wide.abs().amax(dim=1, keepdim=True)
        absmax = absmax.amax(dim=0, keepdim=True) if one else absmax
        factor = torch.where(absmax > 0, LIMIT / absmax, 0.0)
        return Rows(_codes(wide * factor), absmax / LIMIT, None)
    low, high = wide.amin(dim=1, keepdim=True).clamp(max=0), wide.amax(dim=1, keepdim=True).clamp(min=0)
    if one:
        low, high = low.amin(dim=0, keepdim=True), high.amax(dim=0, keepdim=True)
    width = high - low
    factor = torch.where(width > 0, (2 * LIMIT + 1) / width, 0.0)
    zero = (-LIMIT - 1 - low * factor).round().clamp(-LIMIT - 1, LIMIT)
    return Rows(_codes((wide * factor).round() + zero), width / (2 * LIMIT + 1), zero.to(torch.int32))


def rounded_groups(x: Tensor) -> Tensor:
    """x (rows, in) in float32 as it is after `quantize_rows` of every GROUP columns of a row by themselves."""
    rows, columns = x.shape
    groups = pad(x.to(torch.float32), (0, -columns % GROUP)).reshape(-1, GROUP)
    codes, scale, _ = quantize_rows(groups)
    return (codes * scale).reshape(rows, columns + -columns % GROUP)[:, :columns]


def rounded_except(x: Tensor, columns: Tensor, low: Tensor, grouped: bool) -> Tensor:
    """x (rows, in) in float32, all but `columns` rounded by a scale per row or per GROUP columns of a row.

    Symmetric as `quantize_rows` where `low` float32 (1,) is not finite; else x = low + code scale, codes from 0 to 255,
    scale = max(x - low) / 255; what lies below `low` becomes it.
    """
    rows, width = x.shape
    wide = x.to(torch.float32)
    exact = torch.zeros(width, dtype=torch.bool, device=x.device).index_fill_(0, columns.long(), True)
    one_sided = torch.isfinite(low)
    base = torch.where(one_sided, low, 0.0)
    within = torch.where(exact, 0.0, torch.where(one_sided, (wide - base).clamp(min=0), wide))
    size = GROUP if grouped else width
    groups = pad(within, (0, -width % size)).reshape(-1, size)
    absmax = groups.abs().amax(dim=1, keepdim=True)
    limit = torch.where(one_sided, 2 * LIMIT + 1, LIMIT)
    near = (groups * torch.where(absmax > 0, limit / absmax, 0.0)).round() * (absmax / limit)
    return torch.where(exact, wide, near.reshape(rows, width + -width % size)[:, :width] + base)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Rows:
    """x (rows, in) by a given scale float32 (1,) and zero point int8 (1,): codes = round(x / scale) + zero_point.

    What lies outside the range saturates: it was chosen so.
    """
    wide = x.to(torch.float32)
    steps = (wide * (1 / scale)).round()
    zero = None if zero_point is None else zero_point.to(torch.int32).reshape(1, 1)
    codes = _codes(steps if zero is None else steps + zero)
    poison = torch.where(torch.isfinite(wide).all(dim=1, keepdim=True), 0.0, torch.nan)
    return Rows(codes, scale.reshape(1, 1) + poison, zero)


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """Which columns of x (rows, in) hold an |x| of at least `threshold`: bool (in,)."""
    return (x.abs() >= threshold).any(dim=0)


def int_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 (rows, in) @ weight int8 (out, in)^T, exact, int32 (rows, out)."""
    (rows, columns), out = codes.shape, weight.shape[0]
    if not codes.is_cuda:
        if columns == 1:  # torch 2.13 leaves sums of one term unwritten: what it returns is whatever the memory held
            codes, weight = pad(codes, (0, 1)), pad(weight, (0, 1))
        return torch._int_mm(codes.contiguous(), weight.t())
    # cuBLASLt asks for more than 16 rows, and for multiples of 8 elsewhere
    codes = pad(codes, (0, -columns % 8, 0, max(17 - rows, 0)))
    weight = pad(weight, (0, -columns % 8, 0, -out % 8))
    return torch._int_mm(codes.contiguous(), weight.contiguous().t())[:rows, :out]


def scaled(sums: Tensor, rows: Rows, weight: Tensor, row_scale: Tensor) -> Tensor:
    """The product in float32 (rows, out); `weight` int8 (out, in) and its float32 `row_scale` (out, 1) or (1, 1)."""
    if rows.zero_point is not None:
        sums = sums - rows.zero_point * weight.sum(dim=1, dtype=torch.int32)
    return sums.to(torch.float32) * rows.scale * row_scale.reshape(1, -1)


def int8_linear(x: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """`rows` (what x was quantized to) through the weight: (rows, out) in x.dtype."""
    return _finished(scaled(int_product(rows.codes, weight), rows, weight, row_scale), bias, x.dtype)


def outlier_linear(x: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8() (Dettmers et al. 2022, eq. 8): columns with outliers in x.dtype, all others in int8.

    x (rows, in). Which columns are outliers is said by all rows together; they count in no row's scale. The weight's
    outlier columns are dequantized to x.dtype, and their products are summed in float32 where torch does so.
    """
    outlier = outlier_columns(x, threshold)
    rows = quantize_rows(torch.where(outlier, 0, x))
    exact = linear(torch.where(outlier, x, 0), (weight * row_scale).to(x.dtype))
    return _finished(
        scaled(int_product(rows.codes, weight), rows, weight, row_scale) + exact.to(torch.float32), bias, x.dtype
    )


def _codes(steps: Tensor) -> Tensor:
    return steps.round().clamp(-LIMIT - 1, LIMIT).to(torch.int8)


def _finished(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)
