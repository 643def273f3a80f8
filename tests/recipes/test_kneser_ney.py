"""The 5-gram yardstick is a probability model, and equals a plain recursive one on a small text."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "shipped_model"
VOCAB = 7


@pytest.fixture(scope="module")
def kneser_ney():
    sys.path.insert(0, str(RECIPE))  # for its neighbour `scoring`
    try:
        spec = importlib.util.spec_from_file_location("kneser_ney", RECIPE / "kneser_ney.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RECIPE))
    return module


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    return np.random.default_rng(0).zipf(1.6, 400).clip(1, VOCAB).astype(np.uint16) - 1


def adjusted_counts(tokens: list[int], length: int) -> list[dict]:
    grams = [Counter(tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)) for k in range(1, length + 1)]
    lower = [{gram: sum(wider[1:] == gram for wider in grams[k]) for gram in grams[k - 1]} for k in range(1, length)]
    return [*lower, grams[-1]]


def probability(counts: list[dict], discounts: list[np.ndarray], history: tuple, token: int) -> float:
    """The textbook recursion, one token at a time."""
    order = len(history)
    lower = 1 / VOCAB if order == 0 else probability(counts, discounts, history[1:], token)
    following = {gram: count for gram, count in counts[order].items() if gram[:-1] == history}
    total = sum(following.values())
    if total == 0:
        return lower
    discount = {gram: discounts[order][min(count, 3)] for gram, count in following.items()}
    gram = (*history, token)
    kept = following.get(gram, 0) - discount.get(gram, 0.0)
    return (kept + sum(discount.values()) * lower) / total


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_equals_the_recursion(kneser_ney, stream, length):
    test = np.random.default_rng(1).integers(0, VOCAB, 40).astype(np.uint16)
    losses = kneser_ney.token_losses(kneser_ney.train(stream, length, VOCAB), test, VOCAB)
    counts = adjusted_counts(stream.tolist(), length)
    discounts = [kneser_ney.discounts(np.array(list(order.values()))) for order in counts]
    for i in range(1, len(test)):
        history = tuple(test[max(0, i - length + 1) : i].tolist())
        assert losses[i - 1] == pytest.approx(-np.log(probability(counts, discounts, history, int(test[i]))))


def test_sums_to_one_after_any_history(kneser_ney, stream):
    orders = kneser_ney.train(stream, 5, VOCAB)
    for start in range(0, 50, 5):
        history = stream[start : start + 4]
        ends = [np.append(history, token) for token in range(VOCAB)]
        total = sum(np.exp(-kneser_ney.token_losses(orders, end, VOCAB)[-1]) for end in ends)
        assert total == pytest.approx(1.0)
