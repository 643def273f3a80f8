"""The integer programme, against trying every choice."""

from __future__ import annotations

import sys
from itertools import product
from random import Random

import pytest

from whit.allocation import Choice, allocate
from whit.errors import RecipeError

pytest.importorskip("scipy")


def problem(seed: int) -> tuple[list[list[Choice]], int]:
    """Up to five groups of up to four choices, errors over many orders of magnitude, and a budget that can be met."""
    random = Random(seed)
    groups = []
    for _ in range(random.randint(1, 5)):
        scale = 10 ** random.uniform(-9, 0)
        unit = random.choice((1, 7, 4096))
        groups.append(
            [Choice(unit * random.randint(1, 60), scale * random.random()) for _ in range(random.randint(1, 4))]
        )
    sizes = [[choice.bytes for choice in group] for group in groups]
    return groups, random.randint(sum(map(min, sizes)), sum(map(max, sizes)))


def cost(groups: list[list[Choice]], chosen: tuple[int, ...]) -> tuple[int, float]:
    picked = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(choice.bytes for choice in picked), sum(choice.error for choice in picked)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_of_all_is_better(seed: int):
    groups, budget = problem(seed)
    every = (cost(groups, chosen) for chosen in product(*(range(len(group)) for group in groups)))
    best = min(error for size, error in every if size <= budget)
    size, error = cost(groups, allocate(groups, budget))
    assert size <= budget
    assert error == pytest.approx(best, rel=1e-7, abs=0)


def test_a_model_of_the_size_of_many():
    """Hundreds of groups and gigabytes: never above the budget, and never worse than taking steps greedily."""
    random = Random(0)
    groups = []
    for _ in range(300):
        weights, share = 128 * random.randint(10_000, 400_000), 10 ** random.uniform(-4, -2)
        groups.append([Choice(weights * bits // 8 + weights // 32, share * 4.0**-bits) for bits in range(2, 9)])
    budget = sum(group[1].bytes for group in groups)
    size, error = cost(groups, allocate(groups, budget))
    assert 0.999 * budget < size <= budget
    greedy, taken = [0] * len(groups), cost(groups, (0,) * len(groups))[0]
    while True:
        steps = [(g, groups[g][i], groups[g][i + 1]) for g, i in enumerate(greedy) if i + 1 < len(groups[g])]
        steps = [(g, a, b) for g, a, b in steps if taken + b.bytes - a.bytes <= budget]
        if not steps:
            break
        g, a, b = max(steps, key=lambda step: (step[1].error - step[2].error) / (step[2].bytes - step[1].bytes))
        greedy[g], taken = greedy[g] + 1, taken + b.bytes - a.bytes
    assert error <= cost(groups, tuple(greedy))[1] * (1 + 1e-9)


def test_equal_groups_are_decided_in_their_order():
    groups = [[Choice(2, 1.0), Choice(4, 0.25), Choice(4, 0.25)]] * 5
    assert allocate(groups, 14) == (1, 1, 0, 0, 0)
    assert allocate(groups, 10) == (0,) * 5


def test_nothing_fits():
    with pytest.raises(RecipeError, match="the smallest formats take 6"):
        allocate([[Choice(3, 1.0)], [Choice(3, 1.0)]], 5)


def test_without_scipy_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RecipeError, match=r"whit\[allocation\]"):
        allocate([[Choice(3, 1.0)]], 5)
