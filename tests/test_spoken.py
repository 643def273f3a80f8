"""Sizes and durations as they are said."""

from __future__ import annotations

import pytest

from whit.spoken import by_reason, duration, size, took


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (45, "45 s"), (119.4, "119 s"), (289.5, "5 min"), (7100, "118 min"), (12600, "3.5 h")],
)
def test_an_estimate(seconds: float, said: str):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.21, "4.2 s"), (119.9, "119.9 s"), (725, "12 min 5 s"), (3599.6, "1 h 0 min"), (11225, "3 h 7 min")],
)
def test_what_was_measured(seconds: float, said: str):
    assert took(seconds) == said


def test_sizes():
    assert [size(n) for n in (999, 1200, 1.2e9, 3e12)] == ["999 bytes", "1.20 kB", "1.20 GB", "3.00 TB"]


def test_a_reason_is_said_once_for_all_modules():
    blocks = [(f"layers.{i}.{name}", "is narrow") for i in range(3) for name in ("q", "k", "experts.0")]
    found = by_reason([("head", "is wide"), *blocks, ("layers.0.up", "is wide")])
    assert found == ["head and 1 other (2 modules): is wide", "layers.*.q and 2 others (9 modules): is narrow"]
    assert by_reason([("layers.0.up", "is wide"), ("layers.7.up", "is wide")]) == ["layers.*.up (2 modules): is wide"]
    assert by_reason([("layers.0.up", "is wide")]) == ["layers.0.up: is wide"]
