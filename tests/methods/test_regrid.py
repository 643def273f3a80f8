"""New codes on the scales of old ones, against the old codes and the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import whit
from whit.methods.regrid import regrid, share_in_params
from whit.methods.stack import energy
from whit.tensor import LayerStats, QuantizedTensor


def stats(columns: int) -> LayerStats:
    """Of inputs with a few strong directions, as activations have them."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, columns, generator=g) + 5 * torch.randn(300, 4, generator=g) @ torch.randn(
        4, columns, generator=g
    )
    return LayerStats(x.T @ x, 300)


@pytest.mark.parametrize("format", ["int4-g32", "int3-g32-asym", "nf4-dq", "int4-g32+r3"])
def test_codes_are_better_for_the_outputs_than_the_old_and_the_nearest(format: str):
    g = torch.Generator().manual_seed(0)
    present = whit.quantize_tensor(torch.randn(24, 64, generator=g), format)
    target = present.dequantize() + 0.02 * torch.randn(24, 64, generator=g)
    seen = stats(64)
    found = regrid(target, present, seen)
    nearest = regrid(target, present, None)

    def lost(q: QuantizedTensor) -> float:
        return float(energy(target - q.dequantize(), seen.hessian).sum())

    assert lost(found.quantized) < 0.9 * min(lost(present), lost(nearest.quantized))
    assert not found.lossless
    assert found.share < 0.2
    if found.scales == "same":
        for name, param in present.params.items():
            assert not isinstance(param, Tensor) or torch.equal(found.quantized.params[name], param)
    else:
        assert found.scales == "moved"


def test_what_lies_in_zero_points_or_scales_is_merged_without_loss():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 96, generator=g)
    by_group = 0.05 * (torch.randn(16, 2, generator=g) @ torch.randn(2, 3, generator=g)).repeat_interleave(32, dim=1)
    present = whit.quantize_tensor(weight, "int4-g32-asym-fz")
    found = regrid(present.dequantize() + by_group, present, stats(96))
    assert found.lossless
    assert torch.equal(found.quantized.codes, present.codes)
    left = found.quantized.dequantize() - present.dequantize() - by_group
    step = present.params["scale"].float().abs().max()
    assert float(left.abs().max()) < float(step) * 2**-7  # float16 zero points of up to 16
    symmetric = whit.quantize_tensor(weight, "int4-g32-f32")
    scaled = regrid(1.03 * symmetric.dequantize(), symmetric, stats(96))
    assert scaled.lossless
    torch.testing.assert_close(scaled.quantized.dequantize(), 1.03 * symmetric.dequantize())
    assert share_in_params(by_group, symmetric) < 0.3  # no zero point to take it
    assert share_in_params(torch.zeros(16, 96), symmetric) == 1
