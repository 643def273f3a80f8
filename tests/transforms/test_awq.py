"""The scale that AWQ takes is the best of all that there are, by the error of real outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit import AWQ, GPTQ, RTN, Clip, parse_format
from whit.errors import CalibrationError, RecipeError
from whit.methods import stand_in
from whit.tensor import LayerStats
from whit.transforms import parse_transform, transform_options
from whit.transforms.awq import output_error
from whit.transforms.base import Consumer


def inputs(random: torch.Generator, tokens: int = 200, columns: int = 64) -> Tensor:
    """Activations of which every eighth channel is 20 times the others."""
    x = torch.randn(tokens, columns, generator=random)
    x[:, ::8] *= 20
    return x


def stats_of(x: Tensor) -> LayerStats:
    return LayerStats(x.T @ x, len(x), magnitude=x.abs().sum(0))


def consumer(weight: Tensor, x: Tensor, format: str = "int3-g32") -> Consumer:
    return Consumer(weight[None], (stats_of(x),), lambda w, _: RTN()(w, None, parse_format(format)).dequantize())


def best_by_hand(weights: list[Tensor], formats: list[str], x: Tensor, steps: int) -> tuple[int, Tensor]:
    """The paper's search, on the activations themselves: index and scale."""
    errors, scales = [], []
    mean = x.double().abs().mean(0)
    for step in range(steps + 1):
        scale = mean ** (step / steps)
        scale = (scale / (scale.max() * scale.min()) ** 0.5).float()
        error = 0.0
        for weight, format in zip(weights, formats, strict=True):
            near = RTN()(weight * scale, None, parse_format(format)).dequantize() / scale
            error += float(((weight - near).double() @ x.double().T).square().sum())
        errors.append(error)
        scales.append(scale)
    best = min(range(steps + 1), key=lambda i: errors[i])
    return best, scales[best]


@pytest.mark.parametrize("formats", [["int3-g32", "int3-g32"], ["int4-g64-asym", "nf4-g32"], ["int2-g32-asym", "int8"]])
def test_the_scale_is_that_of_an_exhaustive_search(formats: list[str], random: torch.Generator):
    x = inputs(random)
    weights = [torch.randn(48, 64, generator=random), torch.randn(16, 64, generator=random)]
    best, scale = best_by_hand(weights, formats, x, 20)
    assert best > 0
    consumers = [consumer(w, x, f) for w, f in zip(weights, formats, strict=True)]
    assert torch.allclose(AWQ().search(consumers, torch.arange(64)), scale, rtol=1e-6)


def test_the_error_is_that_of_the_outputs(random: torch.Generator):
    x, weight = inputs(random), torch.randn(48, 64, generator=random)
    scale = torch.rand(64, generator=random) + 0.5
    near = RTN()(weight * scale, None, parse_format("int3-g32")).dequantize() / scale
    exact = ((weight - near) @ x.T).double().square().sum()
    assert output_error([consumer(weight, x)], scale) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("method", [RTN(), Clip(), GPTQ()])
def test_salient_channels_are_rounded_better(method, random: torch.Generator):
    sizes = torch.exp(1.5 * torch.randn(128, generator=random))  # activations differ by channel, as in real models
    x, weight = torch.randn(400, 128, generator=random) * sizes, torch.randn(256, 128, generator=random)
    stats, quick, format = stats_of(x), stand_in(method), parse_format("int3-g64-asym")
    seen = Consumer(weight[None], (stats,), lambda w, s: quick(w, s, format).dequantize())
    scale = AWQ().search([seen], torch.arange(128))
    assert float(scale[sizes.argmax()]) > 2 * float(scale[sizes.argmin()])
    plain = method(weight, stats, format).dequantize()
    scaled = method(weight * scale, stats.rescaled(scale), format).dequantize() / scale
    lost = [float(((weight - near) @ x.T).square().sum()) for near in (plain, scaled)]
    assert lost[1] < lost[0] * (0.6 if method == RTN() else 0.9)


def test_without_salient_channels_it_never_loses(random: torch.Generator):
    x, weight = torch.randn(300, 64, generator=random), torch.randn(32, 64, generator=random)
    found = [consumer(weight, x)]
    assert output_error(found, AWQ().search(found, torch.arange(64))) <= output_error(found, torch.ones(64))


def test_columns_of_one_channel_share_a_scale(random: torch.Generator):
    x, weight, channels = inputs(random), torch.randn(32, 64, generator=random), torch.arange(32).repeat(2)
    x[:, 0] *= 3
    scale = AWQ().search([consumer(weight, x)], channels)
    assert torch.equal(scale[:32], scale[32:])
    mean = x.abs().mean(0)
    shared = ((mean[:32] + mean[32:]) / 2).double()
    ratio = scale[:32].double().log() - scale[:1].double().log()
    powers = ratio[1:] / (shared.log() - shared[:1].log())[1:]
    assert float(powers.max() - powers.min()) < 1e-3
    assert float(powers.mean()) > 0


def test_dead_channels_and_dead_inputs(random: torch.Generator):
    x, weight = inputs(random), torch.randn(32, 64, generator=random)
    x[:, 5] = 0
    scale = AWQ().search([consumer(weight, x)], torch.arange(64))
    assert bool(torch.isfinite(scale).all())
    assert float(scale.min()) > 0
    assert torch.equal(AWQ().search([consumer(weight, 0 * x)], torch.arange(64)), torch.ones(64))
    for wrong in (LayerStats(x.T @ x, 200), LayerStats(x.T @ x, 0, magnitude=torch.zeros(64))):
        with pytest.raises(CalibrationError, match="awq: no token reached this activation"):
            AWQ().search([Consumer(weight[None], (wrong,), lambda w, _: w)], torch.arange(64))


def test_the_scale_does_not_depend_on_threads():
    random = torch.Generator().manual_seed(3)
    x, weight = inputs(random, 400, 256), torch.randn(512, 256, generator=random)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(AWQ().search([consumer(weight, x)], torch.arange(256)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_names_and_options():
    assert parse_transform("awq") == AWQ()
    assert parse_transform(transform_options(AWQ(steps=10))) == AWQ(steps=10)
    for wrong, says in [({"name": "awq", "stpes": 3}, "option 'stpes'"), ("awk", "not a transform")]:
        with pytest.raises(RecipeError, match=says):
            parse_transform(wrong)
    with pytest.raises(RecipeError, match="steps 0"):
        AWQ(steps=0)
