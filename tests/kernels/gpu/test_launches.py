"""What is launched for a product on a Hopper GPU, by a driver that only writes down what it is given."""

from __future__ import annotations

import ctypes
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_runs import random_packed

import whit
from whit.kernels.gpu import again, few, kernel, kernel_runs, launches, nvrtc
from whit.kernels.gpu.again import place
from whit.layouts import BITS
from whit.modules import QuantizedLinear
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


Written_down = list[tuple[str, tuple[int, ...]]]


@pytest.fixture
def arguments() -> list[Any]:
    """What kernels were given, in words of 8 bytes, and on which stream."""
    return []


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, arguments: list[Any]) -> Written_down:
    """Names and grids, threads and bytes of shared memory of what is launched."""
    found: Written_down = []

    def start(launch: nvrtc.Launch, stream: int, params: Any = None) -> None:
        config, given = launch.config, launch.params if params is None else params
        grid = config.grid_x, config.grid_y, config.grid_z
        found.append((launch.function.name, (*grid, config.block_x, config.shared)))
        words = ctypes.c_uint64 * (ctypes.sizeof(given) // 8)
        arguments.append((type(launch.params), list(words.from_buffer_copy(given)), stream))

    def encode(at: ctypes.c_void_p, kind: int, rank: int, address: ctypes.c_void_p, *_: Any) -> int:
        ctypes.c_uint64.from_address(at.value or 0).value = address.value or 0
        return 0

    monkeypatch.setattr(nvrtc, "driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    monkeypatch.setattr(nvrtc, "build", lambda source, macros, device: Written(source.stem))
    monkeypatch.setattr(nvrtc.Function, "_reserve", lambda function, shared: None)
    monkeypatch.setattr(nvrtc.Launch, "start", start)
    monkeypatch.setattr(launches, "_device_of", lambda device: (9, 132))
    monkeypatch.setattr(nvrtc, "stream_on", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return found


def packed_as(spec: str, shape: tuple[int, int]) -> PackedWeight:
    return kernel.Gpu().prepare(BITS.pack(whit.quantize_tensor(torch.randn(shape), spec)))


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_and_number_of_rows_is_a_launch_that_a_multiprocessor_has_room_for(
    spec: str, launched: Written_down
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


@pytest.mark.parametrize("spec", ["q4_k", "q6_k", "q5_k", "q8_0", "q4_0", "iq4_xs", "q3_k", "q2_k", "mxfp4"])
def test_ggmls_types_are_launches_that_a_multiprocessor_has_room_for(spec: str, launched: Written_down):
    packed = random_packed(spec, 512, 2048, torch.Generator().manual_seed(0))
    arrived = torch.zeros(32, dtype=torch.int32)
    packed = replace(packed, tensors={**packed.tensors, launches.ARRIVED: arrived})
    for rows in (1, 2, 5, 8, 16, 17, 32, 64, 128, 300, 1024, 4096):
        launched.clear()
        y = kernel_runs.GpuRuns().linear(torch.ones(rows, 2048, dtype=torch.bfloat16), packed, None)
        assert y.shape == (rows, 512)
        assert launched, f"{rows} rows"
        for name, (*grid, threads, shared) in launched:
            assert min(grid) > 0, name
            assert 0 < threads <= 1024, name
            assert shared <= 227 << 10, name


@pytest.mark.parametrize("spec", ["int4-g128", "nf4-dq", "int2-g64"])
def test_weights_that_share_an_input_share_a_launch(spec: str, launched: Written_down):
    weights = [packed_as(spec, (outs, 1024)) for outs in (256, 64, 64)]
    for rows in (1, 8, 16, 40):
        launched.clear()
        ys = kernel.products(torch.ones(rows, 1024, dtype=torch.bfloat16), weights, [None] * 3)
        assert [y.shape for y in ys] == [(rows, 256), (rows, 64), (rows, 64)]
        assert len(launched) == 1, rows


def test_one_row_has_its_norm_its_gate_and_its_sum_in_the_launch_of_a_product(
    launched: Written_down,
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


@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "nf4-dq", "int8-channel", "int3-g128", "int2-g64", "int5-g64"])
@pytest.mark.parametrize("rows", [1, 8, 16, 64, 300, 5000])
def test_a_kept_launch_is_the_one_that_would_be_made_for_the_same_tensors(
    spec: str, rows: int, launched: Written_down, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
):
    packed, bias = packed_as(spec, (256, 1024)), torch.ones(256, dtype=torch.bfloat16)
    x, other = torch.ones(2, 1, rows, 1024, dtype=torch.bfloat16)
    kernel.product(x, packed, bias)
    if not packed.kept:
        pytest.skip("it is more than one launch")
    for given in (other, x.clone()):
        launched.clear(), arguments.clear()
        monkeypatch.setattr(nvrtc, "stream_on", lambda device: 7)
        ours = kernel.product(given, packed, bias)
        packed.kept.clear()
        made = kernel.product(given, packed, bias)
        assert ours.shape == made.shape == (1, rows, 256)
        assert launched[0] == launched[1]
        (kind, kept, stream), (_, fresh, _) = arguments
        assert stream == 7
        own = {place(kind, name) for name in ("y", "partial", "boxes") if list(again.offsets(kind, name))}
        assert {at for at, pair in enumerate(zip(kept, fresh, strict=True)) if len(set(pair)) > 1} <= own
        assert kept[place(kind, "y")] == ours.data_ptr()
        if list(again.offsets(kind, "boxes")):  # the first word of a map is what the driver was given
            assert kept[place(kind, "boxes")] in ({ours.data_ptr()} if rows > 300 else {0, ours.data_ptr()})


def test_a_launch_is_not_kept_for_tensors_that_lie_elsewhere_now(launched: Written_down, arguments: list[Any]):
    packed, x = packed_as("int4-g128", (256, 1024)), torch.ones(1, 1024, dtype=torch.bfloat16)
    kernel.product(x, packed, None)
    (first,) = packed.kept.values()
    packed.tensors["codes"].data = packed.tensors["codes"].clone()
    kernel.product(x, packed, None)
    (second,) = packed.kept.values()
    assert second is not first
    assert packed.tensors["codes"].data_ptr() in arguments[1][1]


def test_x_of_another_kind_has_a_launch_of_its_own(launched: Written_down):
    packed, x = packed_as("int4-g128", (256, 1024)), torch.ones(4, 1024, dtype=torch.bfloat16)
    bias = torch.ones(256, dtype=torch.bfloat16)
    for given, added in ((x, None), (x[:2], None), (x.half(), None), (x, bias), (x.reshape(2, 2, 1024), None)):
        assert kernel.product(given, packed, added).shape == (*given.shape[:-1], 256)
    assert len(packed.kept) == 4  # the last is the first in another shape


def test_x_that_lies_apart_or_unaligned_is_copied(launched: Written_down, arguments: list[Any]):
    packed, x = packed_as("int4-g128", (256, 1024)), torch.ones(4, 2056, dtype=torch.bfloat16)
    for given in (x[:, :1024], x[:1, 1:1025]):
        for _ in range(2):
            kernel.product(given, packed, None)
            assert given.data_ptr() not in arguments[-1][1]


def test_only_so_many_launches_are_kept(launched: Written_down):
    packed = packed_as("int4-g128", (256, 1024))
    for rows in range(1, 2 * again.MOST):
        kernel.product(torch.ones(rows, 1024, dtype=torch.bfloat16), packed, None)
    assert len(packed.kept) <= again.MOST


def test_a_module_keeps_launches_no_longer_than_its_tensors(launched: Written_down, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "why_not", lambda device: None)
    linear = QuantizedLinear(BITS.pack(whit.quantize_tensor(torch.randn(256, 1024), "int4-g128")), None, torch.bfloat16)
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    with torch.no_grad():
        linear(x)
    ((_, prepared),) = linear._ready.values()
    assert prepared.kept
    assert not linear.float()._ready
    copied = pickle.loads(pickle.dumps(linear))
    assert not copied._ready


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_weights_of_runs_keep_their_launches_too(
    rows: int, launched: Written_down, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernel_runs, "has_wgmma", lambda device: True)
    runs = kernel_runs.GpuRuns()
    packed = runs.prepare(BITS.pack(whit.quantize_tensor(torch.randn(256, 2048), "q4_k")))
    x, other = torch.ones(2, rows, 2048, dtype=torch.bfloat16)
    runs.linear(x, packed, None)
    assert len(packed.kept) == 1
    y = runs.linear(other, packed, None)
    assert launched[0] == launched[1]
    kind, words, _ = arguments[1]
    assert (y.shape, words[place(kind, "y")]) == ((rows, 256), y.data_ptr())
    assert other.data_ptr() in words
    assert x.data_ptr() not in words
