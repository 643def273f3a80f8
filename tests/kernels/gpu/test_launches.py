"""What is launched for a product on a Hopper GPU, by a driver that only writes down what it is given."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import whit
from whit.kernels.gpu import few, kernel, launches, nvrtc
from whit.layouts import BITS
from whit.tensor import PackedWeight

FORMATS = (
    "int4-g128", "int4-g64-asym", "nf4", "nf4-dq", "int8-g128", "int8-channel", "int3-g128", "int3-g64", "int2-g64",
    "int5-g64", "int6-g128", "int7-g32", "int1-g64",
)  # fmt: skip
ROWS = (1, 4, 16, 17, 64, 300)


class Written(nvrtc.Function):
    """A kernel that was never compiled."""

    def __init__(self, name: str) -> None:
        self.module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.name, self.shared, self.early = name, nvrtc.FREE_SHARED, True


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Names and grids, threads and bytes of shared memory of what is launched."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def launch(function: Written, config: Any, params: ctypes.Structure, wanted: Any) -> None:
        grid = config.grid_x, config.grid_y, config.grid_z
        found.append((function.name, (*grid, config.block_x, config.shared)))

    driver = SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 0)
    monkeypatch.setattr(nvrtc, "driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "build", lambda source, macros, name, device: Written(name))
    monkeypatch.setattr(nvrtc.Function, "_launch", launch)
    monkeypatch.setattr(launches, "_device_of", lambda device: (9, 132))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return found


def packed_as(spec: str, shape: tuple[int, int]) -> PackedWeight:
    return kernel.Gpu().prepare(BITS.pack(whit.quantize_tensor(torch.randn(shape), spec)))


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_and_number_of_rows_is_a_launch_that_a_multiprocessor_has_room_for(
    spec: str, launched: list[tuple[str, tuple[int, ...]]]
):
    packed = packed_as(spec, (256, 1024))
    for rows in ROWS:
        launched.clear()
        y = kernel.product(torch.ones(rows, 1024, dtype=torch.bfloat16), packed, None)
        assert y.shape == (rows, 256)
        assert launched, f"{rows} rows"
        for name, (*grid, threads, shared) in launched:
            assert min(grid) > 0, name
            assert 0 < threads <= 1024, name
            assert shared <= 227 << 10, name


@pytest.mark.parametrize("spec", ["int4-g128", "nf4-dq", "int2-g64"])
def test_weights_that_share_an_input_share_a_launch(spec: str, launched: list[tuple[str, tuple[int, ...]]]):
    weights = [packed_as(spec, (outs, 1024)) for outs in (256, 64, 64)]
    for rows in (1, 8, 16, 40):
        launched.clear()
        ys = kernel.products(torch.ones(rows, 1024, dtype=torch.bfloat16), weights, [None] * 3)
        assert [y.shape for y in ys] == [(rows, 256), (rows, 64), (rows, 64)]
        assert len(launched) == 1, rows


def test_one_row_has_its_norm_its_gate_and_its_sum_in_the_launch_of_a_product(
    launched: list[tuple[str, tuple[int, ...]]],
):
    gate, up = (packed_as("int4-g128", (256, 1024)) for _ in range(2))
    x, norm = torch.ones(1, 1024, dtype=torch.bfloat16), torch.ones(1024, dtype=torch.bfloat16)
    assert [y.shape for y in kernel.row_through(x, [gate, up], [None] * 2, few.Ends(norm, 1e-5)) or ()] == [
        (1, 256)
    ] * 2
    (y,) = kernel.row_through(x, [gate, up], [None] * 2, few.Ends(norm, 1e-5, gated=True)) or ()
    assert y.shape == (1, 256)
    (z,) = kernel.row_through(x, [up], [None], few.Ends(onto=True), y) or ()
    assert z is y
    assert [name for name, _ in launched] == ["few"] * 3
    other = packed_as("int3-g128", (256, 1024))
    assert kernel.row_through(x, [other], [None], few.Ends(norm, 1e-5)) is None
    assert len(launched) == 3
