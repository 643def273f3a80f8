"""SmoothQuant's scale against the paper's equation, and what it does to W8A8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit import RTN, SmoothQuant, parse_format
from whit.errors import CalibrationError, RecipeError
from whit.kernels import int8
from whit.recipe import Recipe
from whit.tensor import LayerStats
from whit.transforms.base import Consumer

FORMAT = parse_format("int8")


def inputs(random: torch.Generator) -> Tensor:
    """Activations of which two channels are 60 times the others."""
    x = torch.randn(200, 64, generator=random)
    x[:, [5, 40]] *= 60
    return x


def consumer(weight: Tensor, x: Tensor) -> Consumer:
    stats = LayerStats(x.T @ x, len(x), magnitude=x.abs().sum(0), peak=x.abs().amax(0), sample=x)
    return Consumer(weight[None], (stats,), lambda w, _: RTN()(w, None, FORMAT).dequantize())


def w8a8_error(weight: Tensor, x: Tensor, scale: Tensor) -> float:
    """Of a token's output, with weights and activations rounded in the scaled basis, dynamic per token."""
    codes, steps, _ = int8.quantize_rows(x / scale)
    near = (codes.double() * steps) @ RTN()(weight * scale, None, FORMAT).dequantize().double().T
    exact = x.double() @ weight.double().T
    return float(((near - exact).norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_scale_is_the_papers(alpha: float, random: torch.Generator):
    x = inputs(random)
    weights = [torch.randn(48, 64, generator=random), torch.randn(16, 64, generator=random)]
    most = torch.cat(weights).abs().amax(0)
    expected = x.abs().amax(0) ** alpha / most ** (1 - alpha)
    found = SmoothQuant(alpha).search([consumer(w, x) for w in weights], torch.arange(64))
    torch.testing.assert_close(found, expected)


def test_columns_of_one_channel_share_its_scale(random: torch.Generator):
    x, weight = inputs(random), torch.randn(48, 64, generator=random)
    channels = torch.arange(64) // 2
    scale = SmoothQuant(0.5).search([consumer(weight, x)], channels)
    assert torch.equal(scale[::2], scale[1::2])
    pairs = x.abs().amax(0).reshape(-1, 2).amax(1).sqrt() / weight.abs().amax(0).reshape(-1, 2).amax(1).sqrt()
    torch.testing.assert_close(scale[::2], pairs)


def test_smoothing_saves_most_of_what_outliers_cost(random: torch.Generator):
    x, weight = inputs(random), torch.randn(48, 64, generator=random)
    plain = w8a8_error(weight, x, torch.ones(64))
    given = w8a8_error(weight, x, SmoothQuant(0.5).search([consumer(weight, x)], torch.arange(64)))
    searched = w8a8_error(weight, x, SmoothQuant().search([consumer(weight, x)], torch.arange(64)))
    assert given < 0.5 * plain
    assert searched <= given


def test_a_token_that_is_large_in_all_channels_does_not_lead_the_search(random: torch.Generator):
    x, weight = torch.randn(200, 64, generator=random), torch.randn(48, 64, generator=random)
    x[:, 5] *= 40
    x[0] = torch.randn(64, generator=random) * 5000  # as the first token of a text
    x[0, 5] = 0.1
    given, found = (s.search([consumer(weight, x)], torch.arange(64)) for s in (SmoothQuant(0.5), SmoothQuant()))
    assert w8a8_error(weight, x[1:], found) < 0.7 * w8a8_error(weight, x[1:], given)


def test_what_needs_no_smoothing_is_left_alone(random: torch.Generator):
    x = torch.randint(-127, 128, (200, 64), generator=random).float()
    x[:, 0] = 127
    weight = torch.randint(-2, 3, (48, 64), generator=random).float() * 51  # on the grid of its rows
    weight[:, 1] = 127.5
    assert torch.equal(SmoothQuant().search([consumer(weight, x)], torch.arange(64)), torch.ones(64))


def test_its_name_alone_means_w8a8():
    recipe = Recipe("smoothquant")
    assert (recipe.method.name, str(recipe.activations), str(recipe.rules[0][1])) == ("rtn", "int8", "int8-channel")
    assert str(Recipe("smoothquant+gptq", activations="int8-static").activations) == "int8-static"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_what_cannot_be_is_refused(random: torch.Generator):
    x = inputs(random)
    unwatched = Consumer(torch.ones(1, 4, 64), (LayerStats(x.T @ x, 200),), lambda w, _: w)
    with pytest.raises(CalibrationError, match="was not watched"):
        SmoothQuant().search([unwatched], torch.arange(64))
    for wrong in ({"alpha": 1.5}, {"steps": 0}):
        with pytest.raises(RecipeError, match="smoothquant"):
            SmoothQuant(**wrong)
