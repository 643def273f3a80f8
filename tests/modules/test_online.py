"""Static ranges that follow a model's inputs, against a few lines of arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import whit
from whit.activations import parse_activations
from whit.errors import KernelError
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight


def linear(how: str, spec: str = "int8", low: float = -2.0, high: float = 3.0) -> QuantizedLinear:
    """One whose calibrated range is [low, high], or [-high, high]."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    plain, known = BITS.pack(whit.quantize_tensor(weight, spec)), parse_activations(how)
    scale = (high - low) / 255 if not known.symmetric else high / (127 if known.type == "int8" else 448)
    static = {"input_scale": torch.tensor([scale])}
    if not known.symmetric:
        static["input_zero_point"] = torch.tensor([round(-128 - low / scale)], dtype=torch.int8)
    tensors = {**plain.tensors, **static}
    return QuantizedLinear(PackedWeight(plain.layout, plain.format, plain.shape, tensors, activations=known))


@pytest.mark.parametrize(("how", "spec", "largest"), [("int8-static", "int8", 127), ("fp8-static", "fp8", 448)])
def test_a_symmetric_range_follows_its_inputs(how: str, spec: str, largest: int):
    model, low, high = nn.Sequential(linear(how, spec)), -3.0, 3.0
    with torch.inference_mode(), whit.track_ranges(model, momentum=0.25):
        for ends in ((-1.0, 5.0), (-9.0, 0.5), (-0.1, 0.1)):
            x = torch.linspace(*ends, 64).reshape(2, 32)
            low, high = low + 0.25 * (ends[0] - low), high + 0.25 * (ends[1] - high)
            model(x)
            assert model[0].input_scale.item() == pytest.approx(max(-low, high) / largest)
    before = model[0].input_scale.clone()
    model(torch.full((2, 32), 99.0))  # afterwards it stays
    assert torch.equal(model[0].input_scale, before)


def test_an_asymmetric_range_holds_zero_and_moves_its_zero_point():
    model = nn.Sequential(linear("int8-static-asym"))
    with whit.track_ranges(model, momentum=1.0):
        model(torch.linspace(1.0, 4.0, 32)[None])
    assert model[0].input_scale.item() == pytest.approx(4 / 255)
    assert model[0].input_zero_point.item() == -128
    with whit.track_ranges(model, momentum=1.0):
        model(torch.linspace(-1.0, 4.1, 32)[None])
    assert model[0].input_zero_point.item() == -78


def test_restarted_ranges_begin_with_the_first_call():
    model = nn.Sequential(linear("int8-static"))
    with whit.track_ranges(model, momentum=0.1, restart=True):
        model(torch.linspace(-1.0, 1.0, 32)[None])
        assert model[0].input_scale.item() == pytest.approx(1 / 127)
        model(torch.linspace(-2.0, 2.0, 32)[None])
    assert model[0].input_scale.item() == pytest.approx(1.1 / 127)


@pytest.mark.parametrize("restart", [True, False])
def test_what_is_not_finite_moves_nothing(restart: bool):
    model = nn.Sequential(linear("int8-static"))
    before = model[0].input_scale.clone()
    with whit.track_ranges(model, momentum=0.5, restart=restart):
        model(torch.full((1, 32), float("nan")))
        model(torch.full((1, 32), float("inf")))
        assert torch.equal(model[0].input_scale, before)
        model(torch.linspace(-1.0, 1.0, 32)[None])
    assert model[0].input_scale.isfinite().all()


def test_the_ranges_are_what_the_next_product_uses():
    model, x = nn.Sequential(linear("int8-static", high=0.5)), torch.linspace(-4, 4, 64).reshape(2, 32)
    exact = x @ model[0].dequantize().T
    clipped = (model(x) - exact).norm() / exact.norm()
    with whit.track_ranges(model, momentum=1.0):
        followed = (model(x) - exact).norm() / exact.norm()
    assert followed < 0.02 < clipped


def test_there_must_be_a_static_range_and_a_momentum():
    with pytest.raises(KernelError, match="0 linears"), whit.track_ranges(nn.Linear(2, 2)):
        pass
    with pytest.raises(KernelError, match="momentum 0"), whit.track_ranges(linear("int8-static"), momentum=0):
        pass
