"""The best product of thin matrices; the oracles are least squares by turns and the singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit.formats import factors
from whit.formats.factors import best_factors


def lost(error: Tensor, b: Tensor, a: Tensor, hessian: Tensor) -> float:
    rest = error.double() - b @ a
    return float((rest @ hessian * rest).sum())


def case(rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows + columns)
    inputs = torch.randn(tokens, columns, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, columns)
    return torch.randn(rows, columns, generator=g), inputs.T @ inputs


def by_turns(error: Tensor, hessian: Tensor, rank: int, seed: int) -> float:
    """Least squares for A, then for B, until nothing moves: another way to the same minimum."""
    g = torch.Generator().manual_seed(seed)
    error = error.double()
    b = torch.randn(len(error), rank, generator=g, dtype=torch.float64)
    for _ in range(400):
        a = torch.linalg.lstsq(b, error).solution
        b = error @ hessian @ a.T @ torch.linalg.inv(a @ hessian @ a.T)
    return lost(error, b, a, hessian)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 9, 2), (9, 6, 3), (12, 5, 1)])
def test_no_search_finds_a_better_product(rows: int, columns: int, rank: int):
    error, hessian = case(rows, columns, 40)
    b, a = best_factors(error, hessian, rank)
    found = lost(error, b, a, hessian)
    root = torch.linalg.cholesky(hessian)
    tail = torch.linalg.svdvals(error.double() @ root)[rank:].square().sum()
    assert found == pytest.approx(float(tail), rel=1e-9)
    searched = min(by_turns(error, hessian, rank, seed) for seed in range(5))
    assert found <= searched * (1 + 1e-9)
    assert searched == pytest.approx(found, rel=1e-3)


def test_without_inputs_it_is_the_truncated_svd():
    error, _ = case(8, 12, 1)
    b, a = best_factors(error, None, 3)
    u, s, v = torch.linalg.svd(error.double())
    torch.testing.assert_close(b @ a, u[:, :3] * s[:3] @ v[:3])
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_inputs_that_span_little_do_no_harm():
    error, hessian = case(8, 12, 3)  # of rank 3: any root of it is singular
    b, a = best_factors(error, hessian, 3)
    assert lost(error, b, a, hessian) < 1e-9 * float((error.double() @ hessian * error).sum())
    assert float((b @ a).norm()) < float(error.norm())


def test_a_rank_beyond_the_errors_is_filled_with_zeros():
    error, hessian = case(3, 12, 40)
    b, a = best_factors(error, hessian, 5)
    assert b.shape == (3, 5)
    assert a.shape == (5, 12)
    torch.testing.assert_close(b @ a, error.double())
    assert not b[:, 3:].any()
    zero_b, zero_a = best_factors(torch.zeros(4, 6), None, 2)
    assert torch.isfinite(zero_a).all()
    assert not (zero_b @ zero_a).any()


def test_many_rows_are_iterated_to_nearly_the_same(monkeypatch: pytest.MonkeyPatch):
    error, hessian = case(300, 200, 400)
    exact = lost(error, *best_factors(error, hessian, 16), hessian)
    monkeypatch.setattr(factors, "EXACT", 100)
    near = lost(error, *best_factors(error, hessian, 16), hessian)
    assert exact <= near < 1.001 * exact


def test_the_same_bits_on_any_number_of_threads():
    error, hessian = case(150, 130, 400)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(best_factors(error, hessian, 8))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for pair in found[1:] for one, other in zip(found[0], pair, strict=True))
