"""The exact choice of one format per group within a number of bytes: an integer programme, solved by HiGHS.

    minimise sum_g sum_f error[g][f] x[g][f]   subject to   sum_f x[g][f] = 1 for every g,   bytes(x) <= budget

with x binary (a multiple-choice knapsack). Of choices that are no better than another of the same group and no smaller
only the first is considered; of groups with the very same choices the earlier ones get the larger: so ties are
always decided alike.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from whit.errors import RecipeError
from whit.extras import missing

SCALE = 1e3  # an error nearly as small as can be, as the solver sees it: its own gap of 1e-6 then decides nothing
HALVINGS = 60  # of the price of a byte


@dataclass(frozen=True)
class Choice:
    """What a group costs in one format: the bytes of the file that are its own, and the error that it adds."""

    bytes: int
    error: float


def allocate(groups: Sequence[Sequence[Choice]], budget: int) -> tuple[int, ...]:
    """The index of the choice of each group with the least sum of errors whose bytes are at most `budget`.

    RecipeError where even the smallest choices do not fit, or where scipy is not installed.
    """
    least = sum(min(choice.bytes for choice in group) for group in groups)
    if least > budget:
        raise RecipeError(f"budget: {budget} bytes for the groups; the smallest formats take {least}; allow more")
    kept = [_undominated(group) for group in groups]
    room = budget
    while True:
        chosen = _solve([[group[i] for i in indexes] for group, indexes in zip(groups, kept, strict=True)], room)
        picked = [indexes[i] for indexes, i in zip(kept, chosen, strict=True)]
        excess = sum(group[i].bytes for group, i in zip(groups, picked, strict=True)) - budget
        if excess <= 0:
            return _ordered(groups, picked)
        room -= excess  # the solver's tolerance, on numbers of bytes beyond a million


def _undominated(group: Sequence[Choice]) -> list[int]:
    """Indexes of the choices that no other one, or an equal earlier one, makes needless."""
    return [
        i for i, c in enumerate(group)
        if not any(
            d.bytes <= c.bytes and d.error <= c.error and ((d.bytes, d.error) != (c.bytes, c.error) or j < i)
            for j, d in enumerate(group) if j != i
        )
    ]  # fmt: skip


def _ordered(groups: Sequence[Sequence[Choice]], picked: Sequence[int]) -> tuple[int, ...]:
    """The same, with the larger choices of equal groups first."""
    alike: dict[tuple[Choice, ...], list[int]] = defaultdict(list)
    for g, group in enumerate(groups):
        alike[tuple(group)].append(g)
    result = list(picked)
    for choices, members in alike.items():
        order = sorted((picked[g] for g in members), key=lambda i: (-choices[i].bytes, i))
        for g, i in zip(members, order, strict=True):
            result[g] = i
    return tuple(result)


def _solve(groups: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The integer programme itself."""
    optimize, sparse = _scipy()
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    sizes = [choice.bytes for group in groups for choice in group]
    unit = gcd(*sizes) or 1
    errors = np.array([choice.error for group in groups for choice in group], dtype=np.float64)
    near = _near(groups, budget) or errors.max(initial=0.0) or 1.0
    one_each = sparse.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    fits = sparse.csr_matrix(np.array([[size // unit for size in sizes]], dtype=np.float64))
    with _no_output():
        found = optimize.milp(
            errors * (SCALE / near),
            integrality=np.ones(len(owner)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(fits, -np.inf, budget // unit),
            ],
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
    if found.x is None:
        raise RecipeError(f"budget: the solver ended with {found.message!r}; a choice must exist; allow more bytes")
    return [int(np.argmax(found.x[owner == g])) for g in range(len(groups))]


def _near(groups: Sequence[Sequence[Choice]], budget: int) -> float:
    """The error of choices that fit and are nearly best: each group's least of error + price x bytes, one price."""

    def chosen(price: float) -> tuple[int, float]:
        picked = [min(group, key=lambda c: (c.error + price * c.bytes, c.bytes)) for group in groups]
        return sum(c.bytes for c in picked), sum(c.error for c in picked)

    low, high = 0.0, max(c.error for group in groups for c in group) or 1.0  # a byte is never worth more
    if chosen(low)[0] <= budget:
        return chosen(low)[1]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if chosen(middle)[0] <= budget else (middle, high)
    return chosen(high)[1]


@contextmanager
def _no_output() -> Iterator[None]:
    """HiGHS prints notes to its programmers on standard output, where a command's result alone may stand."""
    if os.name != "posix":
        yield
        return
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise RecipeError(missing("allocation", "budget")) from None
    return optimize, sparse
