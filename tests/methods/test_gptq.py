"""GPTQ against a short unblocked optimal-brain reference, code for code, and what must hold for any weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import whit
from whit import GPTQ, RTN, Clip
from whit.methods.feedback import invert_root_
from whit.methods.stack import energy, proxy_loss
from whit.tensor import Format, LayerStats, tensor_param

SPECS = [f"int{bits}-{kind}" for bits in range(2, 9) for kind in ("g32", "g32-asym", "channel", "g40")]
SPECS += [
    "nf4-g32",
    "nf4-channel",
    "nf4-dq",
    "fp4-g32",
    "codebook(-1,-0.3,0.2,1)-g32",
    "int3-tensor",
    "fp8",
    "int1-g32",
]
SPECS += ["int2-g32-asym-fz"]


def correlated(random: torch.Generator, columns: int = 128, tokens: int = 300) -> LayerStats:
    """Inputs that share a few directions, some channels far larger than others."""
    mix = torch.randn(columns, columns, generator=random) * torch.linspace(1, 0.02, columns)[:, None]
    x = torch.randn(tokens, columns, generator=random) @ mix * torch.rand(columns, generator=random).mul(3).exp()
    return LayerStats((x.T @ x).contiguous(), tokens)


def loss(weight: torch.Tensor, quantized: whit.QuantizedTensor, stats: LayerStats) -> float:
    return proxy_loss(weight, quantized.dequantize(), (stats,))


def optimal_brain(weight: torch.Tensor, hessian: torch.Tensor, format: Format, act_order: bool) -> torch.Tensor:
    """Optimal brain quantization, a column at a time: eliminate each from the inverse hessian (float64, unblocked)."""
    hessian = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))
    inverse, work, codes = hessian.inverse(), weight.double().clone(), torch.zeros_like(weight, dtype=torch.int16)
    fixed = act_order or not format.row_independent or "-dq" in str(format)
    params = format.seal(format.fit(weight)) if fixed or not format.group_size else {}
    size, first = format.group_size or len(hessian), 0
    for j in order.tolist():
        if not fixed and format.group_size and j % size == 0:
            params, first = format.fit(work[:, j : j + size].float()), j
        codes[:, j] = format.encode(work[:, j : j + 1], params, j - first)[:, 0]
        error = work[:, j] - format.decode(codes[:, j : j + 1].to(format.code_dtype), params, j - first)[:, 0]
        work -= torch.outer(error, inverse[j] / inverse[j, j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_codes_equal_the_optimal_brain_reference(spec: str, act_order: bool, random: torch.Generator):
    weight, stats, format = torch.randn(24, 128, generator=random), correlated(random), whit.parse_format(spec)
    ours = GPTQ(clip=False, act_order=act_order)(weight, stats, format)
    assert torch.equal(ours.codes.short(), optimal_brain(weight, stats.hessian, format, act_order))


@dataclass(frozen=True)
class Pairs(whit.Affine):
    """Two columns at a time, as vector codebooks are."""

    vector_size = 2


@pytest.mark.parametrize("act_order", [False, True])
def test_jointly_coded_columns_are_eliminated_together(act_order: bool, random: torch.Generator):
    weight, stats, format = torch.randn(24, 128, generator=random), correlated(random), Pairs(3, 32)
    hessian = stats.hessian.double() + 0.01 * stats.hessian.double().diagonal().mean() * torch.eye(128)
    inverse, work = hessian.inverse(), weight.double().clone()
    order = hessian.diagonal().reshape(64, 2).sum(1).argsort(descending=True) if act_order else torch.arange(64)
    fitted, codes = format.fit(weight), torch.zeros(24, 128, dtype=torch.int8)
    for j in (2 * order).tolist():
        if not act_order and j % 32 == 0:
            fitted["scale"][:, j // 32] = format.fit(work[:, j : j + 32].float())["scale"][:, 0]
        codes[:, j : j + 2] = format.encode(work[:, j : j + 2], fitted, j)
        error = work[:, j : j + 2] - format.decode(codes[:, j : j + 2], fitted, j)
        share = inverse[j : j + 2, j : j + 2].inverse() @ inverse[j : j + 2]
        work -= error @ share
        inverse -= inverse[:, j : j + 2] @ share
    assert torch.equal(GPTQ(clip=False, act_order=act_order)(weight, stats, format).codes, codes)
    with pytest.raises(whit.WhitError, match="sweeps"):
        GPTQ(sweeps=1)(weight, stats, format)


@pytest.mark.parametrize("method", [GPTQ(), GPTQ(act_order=True), GPTQ(sweeps=2, refit=True)])
@pytest.mark.parametrize("spec", ["int4-g32", "int3-g64-asym", "int2-g32", "nf4-dq", "int8", "codebook(-1,0,1)-g32"])
def test_loses_less_than_rounding_on_correlated_inputs(spec: str, method: GPTQ, random: torch.Generator):
    weight, stats, format = torch.randn(48, 128, generator=random), correlated(random), whit.parse_format(spec)
    ours, plain, clipped = (m(weight, stats, format) for m in (method, RTN(), Clip()))
    assert not torch.equal(ours.codes, plain.codes)
    assert loss(weight, ours, stats) < 0.8 * min(loss(weight, plain, stats), loss(weight, clipped, stats))


@pytest.mark.parametrize("spec", ["int4-g32", "int3-g40-asym", "int2-g32-asym-fz", "nf4", "int3-tensor", "fp8"])
def test_sweeps_and_refit_only_ever_lessen_the_loss(spec: str, random: torch.Generator):
    weight, format = torch.randn(40, 128, generator=random), whit.parse_format(spec)
    stats = LayerStats(correlated(random).hessian + 10 * torch.eye(128), 300)
    losses = [loss(weight, GPTQ(damp=0, sweeps=n)(weight, stats, format), stats) for n in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0]
    for sweeps in (0, 2):
        refitted = GPTQ(damp=0, sweeps=sweeps, refit=True)(weight, stats, format)
        assert torch.equal(refitted.codes, GPTQ(damp=0, sweeps=sweeps)(weight, stats, format).codes)
        assert loss(weight, refitted, stats) < losses[sweeps]


def test_refit_of_whole_rows_is_the_least_squares_solution(random: torch.Generator):
    weight, stats, format = (
        torch.randn(16, 128, generator=random),
        correlated(random),
        whit.parse_format("int3-channel"),
    )
    q = GPTQ(damp=0, refit=True)(weight, stats, format)
    codes, hessian = q.codes.double(), stats.hessian.double()
    best = (codes @ hessian * weight).sum(1) / (codes @ hessian * codes).sum(1)
    assert torch.allclose(tensor_param(q.params, "scale")[:, 0].double(), best, rtol=1e-6)


def test_a_sweep_finds_the_best_code_of_each_column(random: torch.Generator):
    weight, stats, format = torch.randn(8, 24, generator=random), correlated(random, 24), whit.parse_format("int2-g8")
    q = GPTQ(damp=0.01)(weight, stats, format)
    hessian = stats.hessian.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    codes = q.codes.clone()
    for j in range(24):
        tried = []
        for code in range(-2, 2):
            codes[:, j] = code
            tried.append(energy(weight.double() - format.decode(codes, q.params).double(), hessian))
        codes[:, j] = torch.stack(tried).argmin(0).to(torch.int8) - 2
    assert torch.equal(GPTQ(damp=0.01, sweeps=1)(weight, stats, format).codes, codes)


@pytest.mark.parametrize("spec", ["int4-g32", "nf4", "int2-channel"])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_any_hessian_gives_finite_weights(spec: str, damp: float, random: torch.Generator):
    weight, format = torch.randn(16, 128, generator=random), whit.parse_format(spec)
    x = torch.randn(5, 128, generator=random)
    huge = 1e18 * torch.ones(128, 128)
    dead = correlated(random).hessian
    dead[:, 40:50] = dead[40:50] = 0
    for hessian in (torch.zeros(128, 128), x.T @ x, huge, dead, 1e-30 * dead, torch.eye(128)):
        for method in (GPTQ(damp), GPTQ(damp, act_order=True, refit=True, sweeps=1)):
            decoded = method(weight, LayerStats(hessian, 5), format).dequantize()
            assert (decoded - weight).abs().max() < 8


def test_columns_that_no_token_excited_are_rounded_for_themselves(random: torch.Generator):
    weight, stats, format = (
        torch.randn(16, 128, generator=random),
        correlated(random),
        whit.parse_format("int4-g32-asym"),
    )
    stats.hessian[:, 32:64] = stats.hessian[32:64] = 0
    codes = GPTQ(clip=False)(weight, stats, format).codes
    assert torch.equal(codes[:, 32:64], RTN()(weight, None, format).codes[:, 32:64])


def test_inputs_without_correlation_need_no_feedback(random: torch.Generator):
    weight, format = torch.randn(16, 128, generator=random), whit.parse_format("int3-g32")
    stats = LayerStats(torch.diag(torch.rand(128, generator=random) + 0.1), 9)
    assert torch.equal(GPTQ(damp=0)(weight, stats, format).codes, Clip()(weight, stats, format).codes)


def test_statistics_that_cannot_be_right_are_refused(random: torch.Generator):
    weight, stats, format = torch.randn(4, 128, generator=random), correlated(random), whit.parse_format("int4-g32")
    for wrong in (None, LayerStats(stats.hessian, 0), LayerStats(stats.hessian[:64, :64], 9)):
        with pytest.raises(whit.WhitError, match=r"gptq: .*; .*; "):
            GPTQ()(weight, wrong, format)
    with pytest.raises(whit.WhitError, match="NaN"):
        GPTQ()(weight, LayerStats(stats.hessian * float("nan"), 9), format)
    with pytest.raises(whit.WhitError, match="damp"):
        GPTQ(damp=-1)


@pytest.mark.parametrize("size", [1, 5, 64, 65, 129, 300])
def test_the_factor_is_that_of_the_inverse(size: int, random: torch.Generator):
    x = torch.randn(2 * size + 3, size, generator=random, dtype=torch.float64)
    factor = (x.T @ x).clone()
    invert_root_(factor)
    assert torch.allclose(factor, torch.linalg.cholesky((x.T @ x).inverse(), upper=True), atol=1e-10)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("spec", ["int4-g64", "int3-channel-asym", "nf4-dq"])
def test_codes_do_not_depend_on_threads(spec: str, random: torch.Generator):
    weight, format = torch.randn(700, 576, generator=random), whit.parse_format(spec)
    stats = pairs(*drifting(random, 576, 1000))
    method = GPTQ(refit=True, sweeps=1, act_order="channel" in spec, asymmetric=0.5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = method(weight, stats, format)
        torch.set_num_threads(2)
        two = method(weight, stats, format)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.dequantize(), two.dequantize())


def drifting(random: torch.Generator, columns: int = 128, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs as the quantized model sees them (tokens, columns), and as the unquantized one does."""
    mix = torch.randn(columns, columns, generator=random) * torch.linspace(1, 0.02, columns)[:, None]
    exact = torch.randn(tokens, columns, generator=random) @ mix
    leak = torch.randn(columns, columns, generator=random) / columns**0.5
    return exact + 0.1 * exact @ leak + 0.3 * torch.randn(tokens, columns, generator=random), exact


def pairs(seen: torch.Tensor, exact: torch.Tensor) -> LayerStats:
    return LayerStats(seen.T @ seen, len(seen), (exact - seen).T @ seen)


def made_up_for(weight: torch.Tensor, stats: LayerStats, runs: list[list[int]], share: float) -> torch.Tensor:
    """GPTAQ, a run of columns at a time: once it is fixed, what its inputs drifted is met by those still free."""
    hessian, drift, work = stats.hessian.double(), stats.drift, weight.double().clone()
    assert drift is not None
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    free = [column for run in runs for column in run]
    for run in runs:
        free = free[len(run) :]
        if free:
            to_free = torch.linalg.solve(hessian[free][:, free], drift.double()[run][:, free].T).T
            work[:, free] += share * weight.double()[:, run] @ to_free
    return work


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "spec", ["int4-g32", "int3-g40-asym", "int2-g32-asym", "int4-channel", "nf4-dq", "int3-tensor"]
)
def test_asymmetric_equals_the_column_by_column_reference(spec: str, act_order: bool, random: torch.Generator):
    weight, stats, format = torch.randn(24, 128, generator=random), pairs(*drifting(random)), whit.parse_format(spec)
    order = stats.hessian.diagonal().argsort(descending=True) if act_order else torch.arange(128)
    towards = made_up_for(weight, stats, [[j] for j in order.tolist()], 0.5)
    ours = GPTQ(clip=False, act_order=act_order, asymmetric=0.5)(weight, stats, format)
    assert torch.equal(ours.codes.short(), optimal_brain(towards, stats.hessian, format, act_order))


@pytest.mark.parametrize("act_order", [False, True])
def test_asymmetric_leaves_jointly_coded_columns_to_those_after_them(act_order: bool, random: torch.Generator):
    weight, stats = torch.randn(24, 128, generator=random), pairs(*drifting(random))
    order = stats.hessian.diagonal().reshape(64, 2).sum(1).argsort(descending=True) if act_order else torch.arange(64)
    towards = made_up_for(weight, stats, [[j, j + 1] for j in (2 * order).tolist()], 1.0)
    ours, met = GPTQ(act_order=act_order, asymmetric=1.0), GPTQ(act_order=act_order)
    assert torch.equal(ours(weight, stats, Pairs(3, 32)).codes, met(towards, stats, Pairs(3, 32)).codes)
    assert not torch.equal(met(weight, stats, Pairs(3, 32)).codes, met(towards, stats, Pairs(3, 32)).codes)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", ["int4-g32", "int3-g32-asym"])
def test_asymmetric_comes_nearer_to_what_the_unquantized_model_computes(
    spec: str, act_order: bool, random: torch.Generator
):
    (seen, exact), format = drifting(random), whit.parse_format(spec)
    weight, stats = torch.randn(24, 128, generator=random), pairs(seen, exact)

    def lost(**options: float) -> float:
        q = GPTQ(act_order=act_order, **options)(weight, stats, format).dequantize()
        return float((seen @ q.T - exact @ weight.T).square().sum())

    assert lost(asymmetric=1.0) < lost(asymmetric=0.5) < lost(asymmetric=0.25) < lost()
    assert lost(asymmetric=1.0) < 0.9 * lost()
    assert lost(asymmetric=1.0, sweeps=1, refit=True) < lost(asymmetric=1.0)


def test_asymmetric_needs_pairs_and_inputs_that_differ(random: torch.Generator):
    """Experts have no pairs, the first block's first inputs do not drift: the symmetric loss is what is left."""
    weight, format = torch.randn(24, 128, generator=random), whit.parse_format("int4-g32")
    seen, _ = drifting(random)
    plain = GPTQ()(weight, pairs(seen, seen), format)
    for stats in (pairs(seen, seen), LayerStats(seen.T @ seen, len(seen))):
        assert torch.equal(GPTQ(asymmetric=1.0)(weight, stats, format).codes, plain.codes)
