"""The product of two thin matrices that makes up best for what quantization lost of a matrix.

With E = W - Q (out, in), H = X^T X (in, in) of the inputs, it is the B (out, r), A (r, in) of least

    ||(E - B A) X^T||^2 = tr((E - B A) H (E - B A)^T)

By Eckart and Young B A = U U^T E, where U (out, r) are the first eigenvectors of E H E^T: no root of H is needed, and
H may be singular. Without H it is the truncated singular value decomposition of E. (LQER, Zhang et al. 2024; QERA,
Zhang et al. 2024, theorem 1; CALDERA, Saha et al. 2024.)

Everything is float64, and what LAPACK does runs on one thread: the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

EXACT = 2048  # rows up to which all eigenvectors are found; beyond, the first ones by subspace iteration
OVERSAMPLED = 16
PASSES = 12


def best_factors(error: Tensor, hessian: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) in float64 for an error (out, in) and a hessian (in, in).

    Column i of B and row i of A have the same length. Where `rank` is more than the error has, the rest is zero.
    """
    error = error.to(torch.float64)
    hessian = None if hessian is None else hessian.to(torch.float64)
    count = min(rank, *error.shape)
    directions = _first(error, hessian, count)
    a = directions.T @ error
    length = a.norm(dim=1).sqrt()
    b, a = directions * length, a / torch.where(length > 0, length, 1.0)[:, None]
    if count < rank:
        b = torch.nn.functional.pad(b, (0, rank - count))
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - count))
    return b, a


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch works on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first(error: Tensor, hessian: Tensor | None, count: int) -> Tensor:
    """The first `count` eigenvectors (out, count) of E H E^T, the largest first."""
    if len(error) <= EXACT:
        weighted = error if hessian is None else error @ hessian
        return _eigenvectors(weighted @ error.T, count)
    generator = torch.Generator().manual_seed(0)
    width = min(count + OVERSAMPLED, len(error))
    basis = torch.randn(len(error), width, generator=generator, dtype=torch.float64).to(error.device)
    for _ in range(PASSES):
        basis = _orthonormal(_times(error, hessian, basis))
    return basis @ _eigenvectors(basis.T @ _times(error, hessian, basis), count)


def _times(error: Tensor, hessian: Tensor | None, basis: Tensor) -> Tensor:
    """E H E^T times (out, n)."""
    inside = error.T @ basis
    return error @ (inside if hessian is None else hessian @ inside)


def _eigenvectors(gram: Tensor, count: int) -> Tensor:
    with one_thread():
        vectors: Tensor = torch.linalg.eigh((gram + gram.T) / 2)[1]
    return vectors.flip(1)[:, :count]


def _orthonormal(basis: Tensor) -> Tensor:
    with one_thread():
        columns: Tensor = torch.linalg.qr(basis)[0]
    return columns
