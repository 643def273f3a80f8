"""Static ranges against what numpy and an exhaustive search say on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from whit.activations import parse_activations
from whit.calibration.ranges import LAST, STEPS, Histogram, RangeWatch, input_tensors
from whit.errors import CalibrationError


def seen(x: Tensor, parts: int = 4, momentum: float = 0.25) -> Histogram:
    found = Histogram(momentum)
    for part in x.chunk(parts):
        found.add(part)
    return found


@pytest.fixture
def heavy(random: torch.Generator) -> Tensor:
    """4096 values with long tails, not centred."""
    return torch.randn(4096, generator=random) * torch.randn(4096, generator=random).exp() + 0.5


def step_of(x: Tensor, how: str) -> float:
    return float(input_tensors(seen(x), parse_activations(how))["input_scale"])


def test_counts_do_not_depend_on_the_order(heavy: Tensor):
    small_first, large_first = seen(heavy.abs().sort().values), seen(heavy.abs().sort(descending=True).values)
    assert torch.equal(small_first.counts, large_first.counts)
    assert (small_first.limit, int(small_first.counts.sum())) == (large_first.limit, 4096)
    assert small_first.limit > float(heavy.abs().max()) >= small_first.limit / 2


def test_minmax_and_moving(heavy: Tensor):
    assert step_of(heavy, "int8-static") == pytest.approx(float(heavy.abs().max()) / 127)
    low, high = None, None
    for part in heavy.chunk(4):
        lowest, highest = float(part.min()), float(part.max())
        low = lowest if low is None else low + 0.25 * (lowest - low)
        high = highest if high is None else high + 0.25 * (highest - high)
    assert step_of(heavy, "int8-static-moving0.25") == pytest.approx(max(-low, high) / 127)


@pytest.mark.parametrize("share", [90, 99.9])
def test_percentiles_are_numpys_up_to_a_bin(heavy: Tensor, share: float):
    found = seen(heavy)
    width = found.limit / (len(found.counts) / 2)
    expected = np.percentile(heavy.abs().numpy(), share, method="inverted_cdf")
    assert abs(step_of(heavy, f"int8-static-percentile{share}") * 127 - expected) <= width
    low, high = (np.percentile(heavy.numpy(), p, method="inverted_cdf") for p in (100 - share, share))
    scales = input_tensors(found, parse_activations(f"int8-static-percentile{share}-asym"))
    assert abs(float(scales["input_scale"]) * 255 - (high - low)) <= 3 * width


@pytest.mark.parametrize("asym", ["", "-asym"])
def test_mse_has_the_least_squared_error(random: torch.Generator, asym: str):
    heavy = torch.randn(1 << 17, generator=random)
    heavy[0] = 80.0

    def error(c: float) -> float:
        low, high = max(-80 * c, float(heavy.min())) if asym else -80 * c, 80 * c
        if asym:
            scale = (high - low) / 255
            zero = round(-128 - low / scale)
        else:
            scale, zero = max(-low, high) / 127, 0
        near = (((heavy / scale).round() + zero).clamp(-128, 127) - zero) * scale
        return float((near - heavy).square().sum())

    tried = [error(2.0 ** (-i / STEPS)) for i in range(LAST + 1)]
    scales = input_tensors(seen(heavy), parse_activations(f"int8-static-mse{asym}"))
    zero = float(scales.get("input_zero_point", torch.zeros(1)))
    scale = float(scales["input_scale"])
    near = (((heavy / scale).round() + zero).clamp(-128, 127) - zero) * scale
    assert float((near - heavy).square().sum()) <= 1.02 * min(tried)
    assert min(tried) < 0.9 * tried[0]


def test_entropy_clips_tails_and_keeps_what_has_none(random: torch.Generator):
    flat = torch.rand(1 << 16, generator=random) * 2 - 1
    assert step_of(flat, "int8-static-entropy") == pytest.approx(1 / 127, rel=0.05)
    bulk = torch.randn(1 << 16, generator=random)
    bulk[:3] = 80.0
    assert 2.5 / 127 < step_of(bulk, "int8-static-entropy") < 12 / 127


def test_fp8_ranges_end_at_448_and_zeros_have_a_step(heavy: Tensor):
    assert step_of(heavy, "fp8-static") == pytest.approx(float(heavy.abs().max()) / 448)
    assert step_of(heavy, "fp8-static-mse") <= float(heavy.abs().max()) / 448
    assert step_of(torch.zeros(16), "int8-static") == 1.0


def test_the_largest_columns_stay_exact_and_a_low_end_is_found(random: torch.Generator):
    x = torch.randn(64, 40, generator=random).clamp(-3, 3)
    x[5, 31], x[9, 7] = -50.0, 20.0
    found = input_tensors(seen(x), parse_activations("int8-exact2"))
    assert found["input_columns"].tolist() == [7, 31]
    assert found["input_columns"].dtype == torch.int32
    assert found["input_low"].tolist() == [-torch.inf]
    one_sided = torch.nn.functional.gelu(x)
    found = input_tensors(seen(one_sided), parse_activations("int8-g32-exact1"))
    assert found["input_columns"].tolist() == [7]
    assert found["input_low"].item() == pytest.approx(one_sided.min().item())
    with pytest.raises(CalibrationError, match="40 exact columns of 40"):
        input_tensors(seen(x), parse_activations("int8-exact40"))


def test_a_watch_sees_what_linears_are_given(random: torch.Generator):
    weight, other = torch.randn(4, 8, generator=random), torch.randn(4, 8, generator=random)
    x = torch.randn(3, 8, generator=random)
    with RangeWatch({"one": weight}, 0.1) as watch:
        torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(100 * x, other)
    assert (watch.found["one"].low, watch.found["one"].high) == (float(x.min()), float(x.max()))
    with pytest.raises(CalibrationError, match="no token reached"):
        input_tensors(Histogram(0.1), parse_activations("int8-static"))
    with pytest.raises(CalibrationError, match="not finite"):
        Histogram(0.1).add(torch.tensor([1.0, torch.nan]))
