"""Products of FP8 (E4M3) activations and weights: the torch functions that define correct.

x ~ codes scale with scale = max|x| / 448 per row or for all; the products of codes are exact in float32, and so the
result is that of the dequantized matrices up to the order of a float32 sum. NVIDIA's units multiply the codes
themselves (`torch._scaled_mm`, compute capability 8.9 and newer).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from whit.formats.microfloat import E4M3_MAX
from whit.kernels.int8 import Rows

OLDEST, HOPPER = (8, 9), 9


def quantize_rows(x: Tensor, per_tensor: bool = False) -> Rows:
    """x (rows, in) to float8_e4m3fn codes and float32 scales (rows, 1) or (1, 1); a row of zeros has scale 0."""
    wide = x.to(torch.float32)
    absmax = wide.abs().amax(dim=1, keepdim=True)
    absmax = absmax.amax(dim=0, keepdim=True) if per_tensor and len(x) else absmax
    factor = torch.where(absmax > 0, E4M3_MAX / absmax, 0.0)
    return Rows((wide * factor).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), absmax / E4M3_MAX, None)


def quantize_static(x: Tensor, scale: Tensor) -> Rows:
    """x (rows, in) by a given scale float32 (1,); what lies outside the range saturates."""
    wide = x.to(torch.float32)
    codes = (wide * (1 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Rows(codes, scale.reshape(1, 1), None)


def float8_linear(x: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """`rows` through codes float8_e4m3fn (out, in) times `row_scale` (out, 1) or (1, 1): (rows, out) in x.dtype."""
    if has_units(x, weight) and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] == HOPPER:
        return _finished_by_units(rows, weight, row_scale, bias)
    if has_units(x, weight):
        y = _by_units(rows, weight)
    else:
        y = linear(rows.codes.to(torch.float32), weight.to(torch.float32))
    y = y * rows.scale * row_scale.reshape(1, -1)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def has_units(x: Tensor, weight: Tensor) -> bool:
    """Whether the device multiplies such codes itself."""
    sizes = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return x.is_cuda and sizes and torch.cuda.get_device_capability(x.device) >= OLDEST


def _by_units(rows: Rows, weight: Tensor) -> Tensor:
    """Codes times codes, float32 (rows, out)."""
    one = torch.ones((), device=weight.device)
    return torch._scaled_mm(rows.codes, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


def _finished_by_units(rows: Rows, weight: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The whole product in bfloat16 (rows, out): scales and bias are applied before the sums are rounded, once."""
    left = rows.scale.expand(len(rows.codes), 1).contiguous()
    right = row_scale.reshape(1, -1).expand(1, len(weight)).contiguous()
    return torch._scaled_mm(rows.codes, weight.t(), scale_a=left, scale_b=right, bias=bias, out_dtype=torch.bfloat16)
