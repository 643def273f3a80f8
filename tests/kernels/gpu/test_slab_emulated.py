"""The fused product whose blocks lie beside each other, compiled for the CPU, against float64.

What this cannot see: the instructions themselves, the order of memory between engines, and speed.
benchmarks/gpu_slab.py checks the same on a GPU.
"""

from __future__ import annotations

import emulated_slab
import pytest
import torch
from torch import Generator

import whit
from whit.kernels import reference
from whit.kernels.gpu import slab, stream
from whit.kernels.gpu.slab import Config
from whit.layouts import BITS

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 5e-3, F16: 1e-3}

CASES = [
    ("int4-g128-asym", BF16, 13, (200, 2048), Config(64, 2, 1, 1, 2)),
    ("int8-g128", BF16, 13, (200, 1280), Config(64, 2, 1, 1, 2)),
    ("int4-g128", BF16, 13, (200, 1280), Config(128, 2, 2, 1, 2)),
    ("nf4", BF16, 6, (200, 768), Config(64, 1, 1, 2, 1)),
    ("int4-g128", BF16, 16, (200, 2048), Config(64, 1, 2, 2, 2, 1, 0, 1)),
]
MORE = [
    ("int8", BF16, 16, (200, 1280), Config(64, 2, 2, 1, 2)),
    ("int8", F16, 5, (77, 768), Config(128, 1, 2, 2, 1)),
    ("int8-g64", BF16, 8, (70, 512), Config(64, 1, 1, 2, 1)),
    ("int8-g32-f32", BF16, 3, (70, 512), Config(32, 1, 1, 2, 1)),
    ("int8-g128-f16", F16, 16, (70, 1024), Config(64, 1, 2, 2, 2)),
    ("int2-g64", BF16, 13, (200, 1280), Config(64, 2, 2, 1, 2)),
    ("int2-g128", F16, 13, (70, 512), Config(64, 1, 2, 1, 1)),
    ("int4-g64-asym", BF16, 16, (70, 1024), Config(64, 1, 2, 2, 2)),
    ("int4-g32-asym", F16, 5, (70, 512), Config(64, 2, 2, 1, 1)),
    ("int8-g128-asym", BF16, 7, (70, 1024), Config(64, 1, 1, 2, 2)),
    ("int2-g64-asym", BF16, 7, (70, 1024), Config(64, 1, 1, 2, 2)),
    ("int2", BF16, 7, (70, 512), Config(64, 2, 2, 1, 1)),
    ("int3-g128", BF16, 13, (200, 1280), Config(64, 2, 2, 1, 2)),
    ("int3-g128", F16, 4, (70, 512), Config(32, 1, 1, 2, 1)),
    ("int3", BF16, 16, (70, 512), Config(32, 1, 1, 2, 2)),
    ("int4", BF16, 16, (70, 512), Config(32, 1, 1, 2, 2)),
    ("int4-g128", BF16, 1, (130, 1024), Config(64, 4, 1, 1, 1)),
    ("int4-g128", F16, 8, (77, 1792), Config(128, 2, 4, 2, 2)),
    ("nf4", BF16, 16, (300, 1792), Config(256, 1, 4, 2, 7)),
    ("int4-g128", BF16, 11, (70, 2816), Config(64, 2, 2, 2, 4, mixed=1)),
    ("int4-g128", BF16, 13, (130, 512), Config(128, 1, 2, 1, 1, deep=1)),
    ("int4-g64", BF16, 7, (100, 2048), Config(64, 2, 4, 1, 1)),
    ("nf4-dq", BF16, 11, (70, 2048), Config(64, 2, 1, 1, 1)),
    ("nf4-dq", F16, 11, (70, 1792), Config(64, 2, 1, 3, 1)),
    ("int4-g128", BF16, 9, (115, 1024), Config(112, 2, 1, 2, 1)),
    ("nf4-dq", BF16, 3, (129, 2304), Config(64, 2, 1, 1, 4)),
    ("fp4-g32", BF16, 5, (64, 256), Config(64, 4, 2, 1, 2)),
    ("int4-g64-f16", F16, 2, (70, 2560), Config(64, 1, 2, 1, 8)),
    ("int4-g32-f32", BF16, 16, (64, 512), Config(64, 1, 2, 2, 1)),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("spec", "dtype", "rows", "shape", "config"), [*CASES, *SLOW])
def test_product_of_blocks_beside_each_other_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, shape: tuple[int, int], config: Config, random: Generator
):
    outs, columns = shape
    weight = BITS.pack(whit.quantize_tensor(torch.randn(outs, columns, generator=random), spec))
    scheme = stream.scheme(weight.format, columns)
    assert not isinstance(scheme, str)
    assert slab.why_not(scheme, columns) is None
    x, bias = torch.randn(rows, columns, generator=random).to(dtype), torch.randn(outs, generator=random).to(dtype)
    found = emulated_slab.linear(x, weight, bias, scheme, config)
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T + bias.double()
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[dtype]


def test_weights_that_share_an_input_share_a_launch(random: Generator):
    weights = [
        BITS.pack(whit.quantize_tensor(torch.randn(outs, 512, generator=random), "nf4")) for outs in (70, 64, 12)
    ]
    scheme, x = stream.scheme(weights[0].format, 512), torch.randn(5, 512, generator=random).to(BF16)
    assert not isinstance(scheme, str)
    found = emulated_slab.linears(x, weights, None, scheme, Config(64, 1, 1, 1, 2))
    for y, weight in zip(found, weights, strict=True):
        assert torch.equal(y, emulated_slab.linear(x, weight, None, scheme, Config(64, 1, 1, 1, 2)))


@pytest.mark.parametrize(
    ("spec", "chunk", "steps"),
    [
        ("int8", 32, 0), ("int8-g128", 32, 1), ("int8-g64", 16, 1), ("int8-g32", 8, 1), ("int4", 32, 0),
        ("int4-g128", 32, 1), ("nf4", 16, 1), ("int3", 32, 0), ("int3-g128", 32, 1), ("int2", 32, 0),
        ("int2-g64", 16, 1),
    ],
)  # fmt: skip
def test_steps_are_groups_or_of_128_columns_where_whole_rows_share_a_scale(spec: str, chunk: int, steps: int):
    scheme = stream.scheme(whit.parse_format(spec), 512)
    assert not isinstance(scheme, str)
    read = slab.in_groups(scheme)
    assert (read.chunk, read.steps_per_group) == (chunk, steps)
    assert slab.why_not(scheme, 512) is None


@pytest.mark.parametrize(
    "spec",
    [
        "int8-g256",
        "int3-g256",
        "int2-g256",
        "int8-asym",
        "int5-g128",
        "int3-g128-asym",
        "int4-g64-asym-fz",
        "nf4-g128-dq",
    ],
)
def test_groups_that_a_step_does_not_hold_zero_points_and_other_bits_are_refused(spec: str):
    scheme = stream.scheme(whit.parse_format(spec), 512)
    assert not isinstance(scheme, str)
    assert slab.why_not(scheme, 512) is not None


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize("spec", ["int4-g128", "int8"])
def test_small_and_large_inputs_keep_their_precision(spec: str, size: float, random: Generator):
    weight = BITS.pack(whit.quantize_tensor(1e-3 * torch.randn(32, 256, generator=random), spec))
    scheme = stream.scheme(weight.format, 256)
    assert not isinstance(scheme, str)
    x = (size * torch.randn(3, 256, generator=random)).to(BF16)
    found = emulated_slab.linear(x, weight, None, scheme, Config(32, 1, 1, 1, 1, 1))
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[BF16]
