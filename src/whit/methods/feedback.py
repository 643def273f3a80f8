"""Column by column under a quadratic loss, at the speed of matrix products.

Both passes of GPTQ walk over the columns of a matrix and, after each choice, push the change on to the columns that
are still to come: target[:, later] -= change[:, j] feedback[j, later]. `walk` does so by halving: all of the left
half is finished, one product carries its changes to the right half, then the right half is done in the same way.

Everything is float64. On a CPU torch's products and triangular solves are then equal bit for bit for any number of
threads; LAPACK's Cholesky is not beyond 128 columns (its blocks depend on the threads), hence the one below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from whit.errors import CalibrationError
from whit.formats.factors import one_thread

Choose = Callable[[int, int], Tensor]
Enter = Callable[[int], None]

ONE_THREAD = 128  # columns that are walked on one thread: their products are too small to share, and sharing waits
SINGLE_THREADED = 64  # columns up to which LAPACK factors on one thread
ON_GPU = 2048  # columns that a GPU's own factorization takes at once: many small ones would wait for each other
GROWTH = 10.0  # of the damping, each time that the Cholesky factor does not exist
SMALLEST_DAMP = 1e-6


def _pass_by(first: int) -> None:
    """Nothing is to be done at the beginning of a unit."""


def walk(target: Tensor, feedback: Tensor, choose: Choose, leaf: int, unit: int, enter: Enter = _pass_by) -> Tensor:
    """`choose(first, last)` for every leaf of columns in order, with its change fed to the later rows of `target`.

    `target` (columns, rows) holds a column of the matrix per row, and is changed in place; `feedback` is
    (columns, columns); `choose` returns the change (last - first, rows) of at most `leaf` columns. `enter(first)` is
    called at the beginning of every `unit` columns, when all earlier changes have arrived there. Returns all changes.
    """
    steps = _Walk(target, feedback, torch.empty_like(target), choose, leaf, unit, enter)
    if len(target):
        steps.descend(0, len(target), False)
    return steps.change


@dataclass(frozen=True)
class _Walk:
    """A walk under way. An object, because a function that calls itself by a name outside it is a cycle: the matrices
    that it sees would stay until Python looks for cycles, a block's gigabytes for each block of a model."""

    target: Tensor
    feedback: Tensor
    change: Tensor
    choose: Choose
    leaf: int
    unit: int
    enter: Enter

    def descend(self, first: int, last: int, in_unit: bool) -> None:
        """Columns [first, last), which lie in one unit where `in_unit`."""
        count, target = last - first, self.target
        if not in_unit and count <= self.unit:
            self.enter(first)
            in_unit = True
        if in_unit and count <= self.leaf:
            self.change[first:last] = self.choose(first, last)
        elif in_unit and count <= ONE_THREAD and target.is_cpu and torch.get_num_threads() > 1:
            with one_thread():
                self.descend(first, last, in_unit)
        else:
            step = self.leaf if in_unit else self.unit
            middle = first + step * ((count // step + 1) // 2 if count >= 2 * step else 1)
            self.descend(first, middle, in_unit)
            target[middle:last].addmm_(self.feedback[first:middle, middle:last].T, self.change[first:middle], alpha=-1)
            self.descend(middle, last, in_unit)


def factored(hessian: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, tuple[float, ...]]:
    """The upper triangular U (n, n) float64, with U^T U the inverse of the damped hessian, columns taken in `order`,
    and the shares by which it was damped: `damp`, and ten times as much again until U exists.

    U takes the memory of the damped hessian, which is gigabytes for a wide matrix: who needs both asks for `damped`.
    """
    if not bool(torch.isfinite(hessian.sum(dtype=torch.float64))):
        raise CalibrationError("hessian: holds NaN or infinity; activations must be finite; try another text or dtype")
    shares = [damp]
    while True:
        factor = damped(hessian, shares)
        factor = factor if order is None else factor[order[:, None], order]
        try:
            invert_root_(factor)
        except LinAlgError:
            shares.append(max(shares[-1] * GROWTH, SMALLEST_DAMP))
            continue
        return factor, tuple(shares)


def damped(hessian: Tensor, shares: Sequence[float]) -> Tensor:
    """The hessian (n, n) in float64, with `damped_diagonal`. A column that no token excited has no neighbours: it is
    rounded for itself."""
    matrix = hessian.to(torch.float64, copy=True)
    live = hessian.diagonal() > 0
    matrix.mul_(live).mul_(live[:, None])
    matrix.diagonal().copy_(damped_diagonal(hessian, shares))
    return matrix


def damped_diagonal(hessian: Tensor, shares: Sequence[float]) -> Tensor:
    """The diagonal (n,) in float64, its mean in columns that no token excited, plus `shares` of that mean."""
    diagonal = hessian.diagonal().to(torch.float64, copy=True)
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    diagonal[~live] = mean
    for share in shares:
        diagonal.add_(share * mean)
    return diagonal


def invert_root_(matrix: Tensor) -> None:
    """In place: a positive definite matrix R R^T, R upper triangular, becomes U = R^-1, else LinAlgError.

    The same bits for any number of threads, and no more memory than half the matrix beside it.
    """
    size = len(matrix)
    if size <= (SINGLE_THREADED if matrix.is_cpu else ON_GPU):
        root = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
        unit = torch.eye(size, dtype=root.dtype, device=root.device)
        matrix.copy_(torch.linalg.solve_triangular(root, unit, upper=True))
        return
    half = size // 2
    top, side, bottom = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    invert_root_(bottom)
    root = side @ bottom.T  # R12 = H12 R22^-T
    top.addmm_(root, root.T, alpha=-1)
    invert_root_(top)
    torch.mm(top @ root, bottom, out=root)
    side.copy_(root.neg_())
    matrix[half:, :half] = 0
