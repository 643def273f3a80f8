"""Methods without data: HQQ against its loop written out, clip against an exhaustive search."""

from __future__ import annotations

import pytest
import torch

import whit
from whit import HQQ, RTN, Clip
from whit.methods import METHODS, method_options, parse_method
from whit.tensor import LayerStats

SPECS = [
    "int4-g32",
    "int3-g32-asym",
    "int2-g32-asym-fz",
    "int1-g32",
    "nf4",
    "int8-tensor",
    "codebook(-1,0,1)-g32",
    "fp8",
]

DATA_FREE = [m for m in METHODS if not m.needs_stats]


def heavy_tailed(random: torch.Generator, rows: int = 24, columns: int = 96) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=random)
    return weight * torch.where(torch.rand(rows, columns, generator=random) < 0.03, 6.0, 1.0) * 0.02


@pytest.mark.parametrize("spec", SPECS)
def test_clip_has_the_least_squared_error_of_its_candidates(spec: str, random: torch.Generator):
    weight, format, clip = heavy_tailed(random), whit.parse_format(spec), Clip()
    best = torch.full_like(format.sums(weight), torch.inf)
    for beta in torch.linspace(1, 0.1, 37, dtype=torch.float64).tolist():
        params = format.fit(weight * beta)
        error = weight - format.decode(format.encode(weight, params), params)
        best = torch.minimum(best, format.sums(error.square()))
    chosen = format.sums((clip(weight, None, format).dequantize() - weight).square())
    assert torch.allclose(chosen, best, rtol=1e-4, atol=1e-10)


def test_clip_weighs_errors_by_the_hessian(random: torch.Generator):
    weight, format = heavy_tailed(random), whit.parse_format("int3-g96")
    importance = torch.rand(96, generator=random).pow(4) * 100
    stats = LayerStats(torch.diag(importance), 1)

    def loss(method: Clip, stats: LayerStats | None) -> float:
        return ((method(weight, stats, format).dequantize() - weight).square() * importance).sum().item()

    assert loss(Clip(), stats) < loss(Clip(), None)


def test_clip_weighs_errors_by_what_each_group_adds_to_the_outputs(random: torch.Generator):
    weight, format = heavy_tailed(random), whit.parse_format("int3-g32")
    x = torch.randn(500, 96, generator=random) @ torch.randn(96, 96, generator=random)
    chosen = Clip()(weight, LayerStats(x.T @ x, 500), format).dequantize()
    best = None
    for beta in torch.linspace(1, 0.1, 37, dtype=torch.float64).tolist():
        params = format.fit(weight * beta)
        error = weight - format.decode(format.encode(weight, params), params)
        outputs = torch.stack([error[:, i : i + 32] @ x[:, i : i + 32].T for i in (0, 32, 64)])
        lost = outputs.double().square().sum(-1)  # (groups, rows)
        best = lost if best is None else torch.minimum(lost, best)
    error = weight - chosen
    outputs = torch.stack([error[:, i : i + 32] @ x[:, i : i + 32].T for i in (0, 32, 64)])
    assert torch.allclose(outputs.double().square().sum(-1), best, rtol=1e-3)


def reference_hqq(weight: torch.Tensor, bits: int, scale: torch.Tensor, zero: torch.Tensor, p: float, beta: float):
    """The paper's loop for one group per row with a float zero point; errors in units of the row's RMS."""
    best, least = zero, None
    for _ in range(21):
        codes = (weight / scale + zero).round().clamp(0, 2**bits - 1)
        error = weight - scale * (codes - zero)
        size = error.abs().sum(1, keepdim=True)
        if least is None:
            least = size
        else:
            best, least = torch.where(size < least, zero, best), torch.minimum(size, least)
            beta *= 1.01
        unit = error.square().mean(1, keepdim=True).sqrt()
        shrunk = (error / unit).sign() * ((error / unit).abs() - (error / unit).abs().pow(p - 1) / beta).clamp(min=0)
        zero = (codes - (weight - shrunk * unit) / scale).mean(1, keepdim=True).half().float()
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_equals_the_papers_loop(bits: int, random: torch.Generator):
    weight = heavy_tailed(random, 16, 64)
    format = whit.parse_format(f"int{bits}-g64-asym-fz-f32")
    start = format.fit(weight)
    q = HQQ()(weight, None, format)
    zero = reference_hqq(weight, bits, start["scale"], start["zero_point"].float(), 0.7, 1.0)
    assert torch.equal(q.params["scale"], start["scale"])
    assert torch.allclose(q.params["zero_point"].float(), zero, atol=2e-2)


@pytest.mark.parametrize("spec", SPECS)
def test_hqq_never_loses_to_round_to_nearest_in_absolute_error(spec: str, random: torch.Generator):
    weight, format = heavy_tailed(random), whit.parse_format(spec)
    ours, plain = (format.sums((m(weight, None, format).dequantize() - weight).abs()) for m in (HQQ(), RTN()))
    assert (ours <= plain * (1 + 1e-5)).all()
    if spec != "fp8":
        assert ours.sum() < plain.sum()


@pytest.mark.parametrize("method", DATA_FREE)
def test_methods_do_not_depend_on_threads_or_on_the_rows_beside(method, random: torch.Generator):
    weight, format = torch.randn(3000, 256, generator=random), whit.parse_format("int3-g64-asym")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = method()(weight, None, format)
        torch.set_num_threads(2)
        two = method()(weight, None, format)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.codes[1000:1100], method()(weight[1000:1100], None, format).codes)


@pytest.mark.parametrize("method", METHODS)
def test_options_round_trip(method):
    assert parse_method(method_options(method())) == method()


def test_unknown_methods_and_options_are_named():
    with pytest.raises(whit.WhitError, match="must be one of rtn, clip, hqq, gptq"):
        parse_method("round")
    with pytest.raises(whit.WhitError, match="option 'q' does not exist"):
        parse_method({"name": "hqq", "q": 1})
