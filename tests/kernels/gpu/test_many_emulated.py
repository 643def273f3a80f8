"""The fused product for more rows on Hopper, compiled for the CPU, against float64.

What this cannot see: the instructions themselves, the order of memory between engines, and speed.
benchmarks/gpu_many.py checks the same on a GPU.
"""

from __future__ import annotations

import emulated_many
import pytest
import torch
from torch import Generator

import whit
from whit.kernels import reference
from whit.kernels.gpu import many, narrow, stream
from whit.kernels.gpu.many import Config
from whit.layouts import BITS

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 5e-3, F16: 1e-3}

CASES = [
    ("int4-g128", BF16, 40, Config(2, 2, 2, 2, late=1)),
    ("nf4-dq", BF16, 33, Config(1, 4, 2, 1, pair=2)),
    ("int4-g64", BF16, 50, Config(2, 8, 3, 3, pair=2, min_blocks=2, lead=4)),
    ("int4-g128", BF16, 40, Config(2, 8, 2, 3, lead=4, apart=1)),
    ("int8-g128", BF16, 40, Config(2, 8, 2, 3, lead=4, apart=2)),
    ("int8-g128", BF16, 40, Config(2, 8, 2, 2, pair=2, lead=4)),
    ("int2-g64", BF16, 24, Config(1, 4, 2, 1, lead=4)),
    ("int3-g128", BF16, 24, Config(1, 4, 2, 1, lead=4)),
    ("int4-g128", BF16, 200, Config(2, 16, 2, 1, pair=2, lead=2, halve=1, boxes=1)),
]
MORE = [
    ("int4-g128", BF16, 16, Config(1, 2, 3, 1)),
    ("nf4-dq", BF16, 300, Config(2, 16, 2, 1, pair=2, lead=2, boxes=2)),
    ("int8-channel", F16, 70, Config(1, 8, 2, 1, lead=2, boxes=1)),
    ("nf4", BF16, 9, Config(1, 2, 2, 4, late=1)),
    ("nf4-dq", BF16, 12, Config(2, 2, 2, 4, lead=4, apart=2)),
    ("int2-g64", BF16, 100, Config(1, 16, 2, 2, lead=4, apart=2)),
    ("int4-g64-asym", F16, 70, Config(2, 8, 2, 1)),
    ("fp4-g32", F16, 20, Config(2, 4, 3, 2)),
    ("int4-channel", BF16, 140, Config(1, 16, 2, 1, pair=2)),
    ("int4-g256", BF16, 300, Config(2, 32, 2, 1, pair=2, lead=4)),
    ("int4-g128-asym", BF16, 17, Config(2, 2, 4, 1, late=1)),
    ("nf4", F16, 64, Config(1, 8, 2, 2)),
    ("nf4", BF16, 200, Config(1, 4, 3, 1, pair=2, lead=2)),
    ("nf4-dq", F16, 70, Config(1, 4, 2, 4, lead=2, apart=1)),
    ("int4-g32", BF16, 100, Config(1, 4, 2, 1, lead=6)),
    ("int8-channel", BF16, 70, Config(1, 4, 3, 3, lead=6, apart=1)),
    ("int8-g64", F16, 20, Config(2, 4, 2, 1, lead=4)),
    ("int8-g32-asym", BF16, 33, Config(1, 8, 2, 1, min_blocks=2, lead=4)),
    ("int2-g128", F16, 17, Config(1, 4, 2, 2, lead=8)),
    ("int2-g64-asym", BF16, 40, Config(2, 8, 2, 1, lead=4)),
    ("int2-channel", BF16, 40, Config(1, 8, 2, 1, lead=4)),
    ("int3-g128-asym", F16, 33, Config(1, 8, 2, 1, min_blocks=2, lead=4)),
    ("int5-g128", BF16, 40, Config(2, 8, 2, 2, lead=4, apart=1)),
    ("int5-channel-asym", BF16, 20, Config(1, 4, 3, 1, lead=4)),
    ("int6-g128", BF16, 20, Config(2, 4, 2, 1, lead=4)),
    ("int6-g128", F16, 40, Config(1, 8, 2, 1, lead=4)),
    ("int5-g64", BF16, 40, Config(2, 8, 2, 2, lead=4)),
    ("int6-g32", BF16, 40, Config(2, 8, 2, 1, lead=4)),
    ("int3-g32", BF16, 40, Config(1, 4, 2, 1, lead=4)),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("spec", "dtype", "rows", "config"), [*CASES, *SLOW])
def test_product_of_more_rows_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, config: Config, random: Generator
):
    outs, columns = 200, 768
    weight = BITS.pack(whit.quantize_tensor(torch.randn(outs, columns, generator=random), spec))
    scheme = narrow.scheme(weight.format, columns) or stream.scheme(weight.format, columns)
    assert not isinstance(scheme, str)
    assert many.why_not(scheme, columns) is None
    x, bias = torch.randn(rows, columns, generator=random).to(dtype), torch.randn(outs, generator=random).to(dtype)
    (found,) = emulated_many.linears(x, [weight], bias, scheme, config)
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T + bias.double()
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[dtype]


def test_weights_that_share_more_rows_are_multiplied_in_one_launch(random: Generator):
    weights = [BITS.pack(whit.quantize_tensor(torch.randn(n, 256, generator=random), "nf4")) for n in (130, 8, 64)]
    x, scheme = torch.randn(20, 256, generator=random).to(BF16), stream.scheme(weights[0].format, 256)
    assert not isinstance(scheme, str)
    for weight, found in zip(
        weights, emulated_many.linears(x, weights, None, scheme, Config(1, 2, 2, 2, late=1)), strict=True
    ):
        wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[BF16]


def test_outs_of_several_weights_are_copied_to_each_where_their_rows_can_be(random: Generator):
    weights = [BITS.pack(whit.quantize_tensor(torch.randn(n, 256, generator=random), "int4-g64")) for n in (136, 8, 64)]
    x, scheme = torch.randn(70, 256, generator=random).to(BF16), stream.scheme(weights[0].format, 256)
    assert not isinstance(scheme, str)
    config = Config(1, 8, 2, 1, lead=2, boxes=1)
    assert config.for_outs([136, 8]) == config
    assert config.for_outs([136, 12]) == Config(1, 8, 2, 1, lead=2)
    for weight, found in zip(weights, emulated_many.linears(x, weights, None, scheme, config), strict=True):
        wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[BF16]


def test_blocks_that_wait_for_each_other_give_the_bits_of_blocks_of_which_the_last_adds_up(random: Generator):
    weight = BITS.pack(whit.quantize_tensor(torch.randn(200, 1024, generator=random), "int4-g128"))
    x, scheme = torch.randn(40, 1024, generator=random).to(BF16), stream.scheme(weight.format, 1024)
    assert not isinstance(scheme, str)
    (shared,), (last,) = (
        emulated_many.linears(x, [weight], None, scheme, Config(2, 8, 2, 4, lead=4, apart=apart)) for apart in (2, 1)
    )
    assert torch.equal(shared, last)


@pytest.mark.parametrize(("rows", "config", "processors"), [
    (100, Config(1, 16, 2, 1, lead=4, halve=1), 3), (200, Config(1, 16, 2, 1, pair=2, lead=2, halve=1), 6),
])  # fmt: skip
def test_tiles_of_the_last_turn_are_of_half_the_height_where_that_gives_more_blocks_work(
    rows: int, config: Config, processors: int, random: Generator
):
    weight = BITS.pack(whit.quantize_tensor(torch.randn(200, 512, generator=random), "int4-g128"))
    x, scheme = torch.randn(rows, 512, generator=random).to(BF16), stream.scheme(weight.format, 512)
    assert not isinstance(scheme, str)
    assert config.grid([200], rows, processors)[0] == processors
    (found,) = emulated_many.linears(x, [weight], None, scheme, config, processors)
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[BF16]
    (alone,) = emulated_many.linears(x, [weight], None, scheme, config, 64)
    assert torch.equal(found, alone)


@pytest.mark.parametrize("exponent", [-40, 14])
def test_codes_of_very_small_and_very_large_scales_are_exact(exponent: int, random: Generator):
    dense = torch.randn(72, 256, generator=random) * 2.0**exponent
    weight = BITS.pack(whit.quantize_tensor(dense, "int4-g128"))
    x, scheme = torch.randn(20, 256, generator=random).to(BF16), stream.scheme(weight.format, 256)
    assert not isinstance(scheme, str)
    (found,) = emulated_many.linears(x, [weight], None, scheme, Config(1, 4, 2, 1))
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[BF16]
