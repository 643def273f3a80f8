"""The benchmark that stamps many.cu's blocks still finds the places where it puts its stamps."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from whit.kernels.gpu import many, nvrtc

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from gpu_stamps import POINT, stamped, times


def test_every_point_has_a_place_in_the_kernel():
    source = stamped(nvrtc.text(many.SOURCE))
    assert all(f" STAMP({point})" in source for point in POINT.values())


def test_times_are_counted_from_the_end_of_the_product_before():
    stamps = torch.zeros(8, 2, 16, dtype=torch.int64)
    for product in range(8):
        stamps[product, :, POINT["begins"]] = 1_000_000 + product * 10_000
        stamps[product, :, POINT["multiplied"]] = 1_005_000 + product * 10_000
        stamps[product, 1, POINT["ends"]] = 1_009_000 + product * 10_000
        stamps[product, 0, POINT["ends"]] = 500_000  # of a chain before
    found = times(stamps)
    assert found == {"begins": [1, 1, 1, 2], "multiplied": [6, 6, 6, 2], "ends": [10, 10, 10, 1]}
