"""Sums of x^T x for calibration: exactness, shapes, pointers, threads, and what calibration makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from whit.calibration.capture import Watch
from whit.kernels.cpu import add_gram, library
from whit.tensor import LayerStats

COMPILED = library()
pytestmark = pytest.mark.skipif(
    isinstance(COMPILED, str) or "avx512_bf16" not in COMPILED.isas, reason="no bfloat16 products here"
)


def gram(x: Tensor) -> Tensor:
    sums = torch.zeros(x.shape[1], x.shape[1])
    assert add_gram(x, sums)
    return sums


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 47), (7, 48), (128, 49), (129, 97), (300, 200), (5, 500)])
def test_the_lower_triangle_is_the_product_and_the_rest_is_left(rows: int, columns: int, random: Generator):
    x = torch.randn(rows, columns, generator=random).to(torch.bfloat16)
    exact, size = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    sums = torch.full((columns, columns), 3.0)
    assert add_gram(x, sums)
    assert bool(((sums.double() - 3 - exact).tril().abs() <= 1e-6 * (size + 3)).all())
    assert bool((sums[torch.ones(columns, columns).triu(1) > 0] == 3).all())


def test_it_is_no_less_exact_than_torchs_float32_product(random: Generator):
    x = torch.randn(1024, 200, generator=random).to(torch.bfloat16)
    exact = (x.double().T @ x.double()).tril()
    ours, theirs = gram(x).double() - exact, (x.float().T @ x.float()).tril().double() - exact
    assert ours.square().sum() <= theirs.square().sum()


def test_small_integers_are_exact_from_any_pointer(random: Generator):
    x = torch.randint(-8, 9, (333, 130), generator=random)
    flat = torch.empty(x.numel() + 3, dtype=torch.bfloat16)
    for offset in (0, 1, 3):
        moved = flat[offset : offset + x.numel()].reshape(x.shape).copy_(x)
        assert torch.equal(gram(moved), (x.T @ x).tril().float())


def test_the_number_of_threads_changes_no_bit(random: Generator, threads: None):
    x = torch.randn(300, 250, generator=random).to(torch.bfloat16)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(gram(x))
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_other_types_are_not_taken(random: Generator):
    sums = torch.zeros(4, 4)
    assert not add_gram(torch.ones(3, 4), sums)
    assert not sums.any()


def watched(weight: Tensor, samples: Tensor, fast: bool) -> LayerStats:
    watch = Watch({"w": weight}, add_gram if fast else None)
    with watch:
        for sample in samples:
            torch.nn.functional.linear(sample, weight)
    return watch.stats().of("w")[0]


@pytest.mark.parametrize("columns", [100, 600])
def test_calibration_has_whole_symmetric_sums(columns: int, random: Generator):
    samples = torch.randn(3, 40, columns, generator=random)
    weight = torch.ones(5, columns)
    for dtype in (torch.bfloat16, torch.float32):
        x = samples.to(dtype)
        ours, plain = watched(weight.to(dtype), x, True), watched(weight.to(dtype), x, False)
        assert torch.equal(ours.hessian, ours.hessian.T)
        torch.testing.assert_close(ours.hessian, plain.hessian, rtol=1e-5, atol=1e-4)
        assert ours.token_count == plain.token_count == 120
