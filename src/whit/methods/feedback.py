"""Column by column under a quadratic loss, at the speed of matrix products.

Both passes of GPTQ walk over the columns of a matrix and, after each choice, push the change on to the columns that
are still to come: target[:, later] -= change[:, j] feedback[j, later]. `walk` does so by halving: all of the left
half is finished, one product carries its changes to the right half, then the right half is done in the same way.

Everything is float64. On a CPU torch's products and triangular solves are then equal bit for bit for any number of
threads; LAPACK's Cholesky is not beyond 128 columns (its blocks depend on the threads), hence the one below.
"""

from __future__ import annotations

from collections.abc import Callable

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
    change = torch.empty_like(target)

    def descend(first: int, last: int, in_unit: bool) -> None:
        count = last - first
        if not in_unit and count <= unit:
            enter(first)
            in_unit = True
        if in_unit and count <= leaf:
            change[first:last] = choose(first, last)
        elif in_unit and count <= ONE_THREAD and target.is_cpu and torch.get_num_threads() > 1:
            with one_thread():
                descend(first, last, in_unit)
        else:
            step = leaf if in_unit else unit
            middle = first + step * ((count // step + 1) // 2 if count >= 2 * step else 1)
            descend(first, middle, in_unit)
            target[middle:last].addmm_(feedback[first:middle, middle:last].T, change[first:middle], alpha=-1)
            descend(middle, last, in_unit)

    if len(target):
        descend(0, len(target), False)
    return change


def prepare(hessian: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The damped float64 hessian (n, n), and the upper triangular U with U^T U its inverse, columns taken in `order`.

    A column that no token excited gets the mean of the diagonal and no neighbours: it is rounded for itself. `damp`
    times that mean is added to the diagonal, and ten times as much again until the factor exists.
    """
    hessian = hessian.to(torch.float64, copy=True)
    if not bool(torch.isfinite(hessian.sum())):
        raise CalibrationError("hessian: holds NaN or infinity; activations must be finite; try another text or dtype")
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    hessian.mul_(live).mul_(live[:, None])
    diagonal[~live] = mean
    diagonal.add_(damp * mean)
    while True:
        factor = hessian.clone() if order is None else hessian[order][:, order]
        try:
            invert_root_(factor)
        except LinAlgError:
            damp = max(damp * GROWTH, SMALLEST_DAMP)
            diagonal.add_(damp * mean)
            continue
        return hessian, factor


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
