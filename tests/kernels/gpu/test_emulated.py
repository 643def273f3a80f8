"""The CUDA sources, compiled for the CPU with fibers for threads, against float64 and against the reference.

What this cannot see: the inline assembly, the order of memory between blocks, and speed. benchmarks/gpu_kernels.py
--check runs the same comparisons, and more of them, on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import whit
from whit.kernels import reference
from whit.kernels.gpu import few, kernel, narrow, stream, tiled, tuned
from whit.kernels.gpu.scales import storage
from whit.kernels.gpu.stream import Config, Scheme
from whit.layouts import BITS
from whit.tensor import PackedWeight

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 4e-3, F16: 1e-3}  # bfloat16 levels and results; float16's


def packed(spec: str, outs: int, columns: int, random: Generator) -> PackedWeight:
    return BITS.pack(whit.quantize_tensor(torch.randn(outs, columns, generator=random), spec))


def scheme_of(weight: PackedWeight) -> Scheme:
    found = stream.scheme(weight.format, weight.shape[1])
    assert not isinstance(found, str), found
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


FUSED = [
    ("int4-g128", BF16, 1, Config(1, 2, 1, 2, 1, 1)),
    ("int4-g128-asym", F16, 11, Config(2, 1, 2, 1, 2, 1)),
    ("nf4-dq", BF16, 3, Config(1, 2, 2, 2, 2, 1)),
    ("fp4-g32", F16, 9, Config(1, 1, 4, 1, 3, 1)),
    ("int8", BF16, 5, Config(1, 2, 2, 2, 1, 1)),
    ("int8-g32-asym", F16, 8, Config(2, 2, 1, 1, 2, 1)),
    ("int3-g128-asym", BF16, 2, Config(1, 1, 2, 1, 2, 1)),
    ("int2-g64", F16, 17, Config(1, 2, 1, 4, 1, 1)),
    ("int1-channel", BF16, 1, Config(1, 1, 1, 1, 2, 1)),
    ("int5-g128-asym-fz", BF16, 70, Config(1, 1, 2, 1, 1, 1)),
    ("int7-channel-asym", F16, 4, Config(1, 1, 2, 2, 1, 1)),
]


def test_weights_that_share_an_input_are_multiplied_in_one_launch(random: Generator):
    weights = [packed("nf4", outs, 256, random) for outs in (48, 17, 16)]
    x = torch.randn(2, 256, generator=random).to(BF16)
    for weight, found in zip(
        weights, emulated.few_linears(x, weights, None, scheme_of(weights[0]), few.Config(2, 2, 1)), strict=True
    ):
        wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
        assert error(found, wanted) < LIMIT[BF16]


FEW = [
    ("int4-g128", BF16, 1, few.Config(4, 2, 1), 1),
    ("nf4-dq", BF16, 8, few.Config(1, 4, 1), 3),
    ("int3-channel", BF16, 13, few.Config(4, 3, 1), 1),
    ("nf4", BF16, 1, few.Config(2, 3, 1, 2), 1),
]
MORE_FEW = [
    ("int4-g64-asym", F16, 3, few.Config(2, 4, 1), 2),
    ("nf4", BF16, 1, few.Config(3, 4, 1), 1),
    ("nf4", F16, 2, few.Config(2, 4, 1), 1),
    ("fp4-g32", F16, 2, few.Config(2, 2, 1), 1),
    ("int8-channel", BF16, 5, few.Config(2, 2, 1), 2),
    ("int7-g128-asym-fz", F16, 1, few.Config(1, 2, 1), 1),
    ("int2-g64", BF16, 16, few.Config(4, 2, 1), 2),
    ("nf4-dq", F16, 3, few.Config(1, 2, 1, 2), 2),
    ("fp4-g32", BF16, 2, few.Config(3, 2, 1, 4), 1),
    ("int4-g64-asym", BF16, 1, few.Config(2, 1, 1, 2), 1),
    ("int2-g64", F16, 2, few.Config(3, 1, 1, 4), 1),
    ("int3-g128-asym", BF16, 1, few.Config(1, 1, 1, 2), 1),
]
SLOW_FEW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_FEW]


@pytest.mark.parametrize(("spec", "dtype", "rows", "config", "cuts"), [*FEW, *SLOW_FEW])
def test_product_of_few_rows_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, config: few.Config, cuts: int, random: Generator
):
    weight = packed(spec, 70, 768, random)
    x, bias = torch.randn(rows, 768, generator=random).to(dtype), torch.randn(70, generator=random).to(dtype)
    (found,) = emulated.few_linears(x, [weight], bias, scheme_of(weight), config, cuts)
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T + bias.double()
    assert error(found, wanted) < LIMIT[dtype]


ENDS = [("int4-g128", BF16, few.Config(4, 2, 1)), ("nf4-dq", BF16, few.Config(2, 4, 1, 2, 1))]
MORE_ENDS = [
    ("int4-g64-asym", F16, few.Config(2, 1, 1)),
    ("nf4", F16, few.Config(3, 3, 1)),
    ("int8-channel", BF16, few.Config(2, 2, 1)),
]
SLOW_ENDS = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_ENDS]


@pytest.mark.parametrize(("spec", "dtype", "config"), [*ENDS, *SLOW_ENDS])
def test_a_row_is_normed_gated_and_added_to_in_the_launch_of_its_product(
    spec: str, dtype: torch.dtype, config: few.Config, random: Generator
):
    weights = [packed(spec, 70, 768, random) for _ in range(2)]
    gate, up = (reference.dequantize(weight, torch.float32).double().T for weight in weights)
    scheme, x = scheme_of(weights[0]), (3 * torch.randn(1, 768, generator=random)).to(dtype)
    norm, y = torch.rand(768, generator=random).to(dtype), torch.randn(1, 70, generator=random).to(dtype)
    root = (x.double().square().mean() + 1e-5).sqrt()
    normed = (norm * (x.double() / root).to(dtype)).double()
    nothing = torch.full((1, 140), float("nan"), dtype=dtype)
    found = emulated.few_row(x, weights, scheme, config, few.Ends(norm, 1e-5), nothing)
    assert error(found, normed @ torch.cat((gate, up), 1)) < LIMIT[dtype]
    wanted = torch.nn.functional.silu(normed @ gate) * (normed @ up)
    found = emulated.few_row(x, weights, scheme, config, few.Ends(norm, 1e-5, gated=True), nothing[:, :70].clone())
    assert error(found, wanted) < 2 * LIMIT[dtype]
    wanted = y.double() + x.double() @ gate
    assert error(emulated.few_row(x, weights[:1], scheme, config, few.Ends(onto=True), y), wanted) < LIMIT[dtype]


NARROW = [("int5-g64", BF16, 3), ("int3-g32", F16, 2), ("int6-g32-asym", BF16, 9), ("int3-g32", BF16, 9)]
MORE_NARROW = [
    ("int6-g64-asym", BF16, 1),
    ("int1-g64", BF16, 4),
    ("int7-g32", BF16, 1),
    ("int3-g64", F16, 16),
    ("int1-g64", BF16, 7),
    ("int5-g64", BF16, 8),
    ("int6-g64", BF16, 16),
    ("int7-g32", BF16, 9),
]
SLOW_NARROW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_NARROW]


@pytest.mark.parametrize(("spec", "dtype", "rows"), [*NARROW, *SLOW_NARROW])
def test_narrow_groups_of_odd_bits_lie_side_by_side(spec: str, dtype: torch.dtype, rows: int, random: Generator):
    weight, x = packed(spec, 40, 1024, random), torch.randn(rows, 1024, generator=random).to(dtype)
    assert isinstance(stream.scheme(weight.format, 1024), str)
    scheme = narrow.scheme(weight.format, 1024)
    assert scheme is not None
    (found,) = emulated.few_linears(x, [weight], None, scheme, few.Config(8, 2, 2))
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert error(found, wanted) < LIMIT[dtype]


@pytest.mark.parametrize(
    ("spec", "rows", "spread"), [("int2-g64", 9, 4), ("int4-g64-asym", 17, 2), ("int2-g64", 70, 2)]
)
def test_groups_side_by_side_in_tiles(spec: str, rows: int, spread: int, random: Generator):
    weight, x = packed(spec, 70, 1024, random), torch.randn(rows, 1024, generator=random).to(BF16)
    scheme = tiled.widened(scheme_of(weight), rows, 1024)
    assert scheme.spread == spread
    assert tiled.widened(scheme_of(weight), rows, scheme.step + 64).spread == 1
    found = emulated.tiled_linear(x, weight, None, scheme, tiled.Config(1, 1, 2, 2, 3, 3))
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert error(found, wanted) < LIMIT[BF16]


@pytest.mark.parametrize(("spec", "dtype", "rows", "splits"), [("int5-g64", BF16, 20, 1), ("int3-g32-asym", F16, 9, 2)])
def test_more_rows_of_narrow_groups(spec: str, dtype: torch.dtype, rows: int, splits: int, random: Generator):
    weight, x = packed(spec, 70, 1024, random), torch.randn(rows, 1024, generator=random).to(dtype)
    scheme = narrow.scheme(weight.format, 1024)
    assert scheme is not None
    found = emulated.tiled_linear(x, weight, None, scheme, tiled.Config(1, 1, 4, 2, 3, splits))
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert error(found, wanted) < LIMIT[dtype]


@pytest.mark.parametrize(("spec", "dtype", "rows", "config"), FUSED)
def test_fused_product_equals_float64(spec: str, dtype: torch.dtype, rows: int, config: Config, random: Generator):
    weight = packed(spec, 70, 768, random)
    x, bias = torch.randn(rows, 768, generator=random).to(dtype), torch.randn(70, generator=random).to(dtype)
    wanted = x.double() @ BITS.unpack(weight).dequantize(torch.float64).T + bias.double()
    found = emulated.linear(x, weight, bias, scheme_of(weight), config)
    assert error(found, wanted) < LIMIT[dtype]
    assert error(emulated.linear(x, weight, None, scheme_of(weight), config), wanted - bias.double()) < LIMIT[dtype]


TILED = [
    ("int4-g128", BF16, 16, tiled.Config(1, 1, 2, 2, 3, 1)),
    ("int4-g64-asym", F16, 19, tiled.Config(1, 1, 4, 1, 3, 2)),
    ("nf4-dq", BF16, 20, tiled.Config(1, 1, 2, 2, 4, 2)),
    ("int8", BF16, 17, tiled.Config(2, 1, 2, 3, 3, 1)),
    ("int8-channel-asym", F16, 5, tiled.Config(1, 2, 2, 2, 3, 3)),
    ("int3-g128-asym", BF16, 30, tiled.Config(1, 1, 4, 2, 3, 1)),
    ("int2-g64", BF16, 9, tiled.Config(1, 1, 2, 2, 3, 1)),
    ("int1-channel", F16, 12, tiled.Config(1, 1, 2, 2, 3, 2)),
    ("int5-g128-asym-fz", BF16, 18, tiled.Config(1, 1, 4, 1, 3, 1)),
]


@pytest.mark.parametrize(("spec", "dtype", "rows", "config"), TILED)
def test_tiled_product_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, config: tiled.Config, random: Generator
):
    weight = packed(spec, 70, 768, random)
    x, bias = torch.randn(rows, 768, generator=random).to(dtype), torch.randn(70, generator=random).to(dtype)
    wanted = x.double() @ BITS.unpack(weight).dequantize(torch.float64).T + bias.double()
    found = emulated.tiled_linear(x, weight, bias, scheme_of(weight), config)
    assert error(found, wanted) < LIMIT[dtype]


def test_a_rows_result_does_not_depend_on_its_batch(random: Generator):
    weight = packed("int4-g128", 70, 2048, random)
    scheme, x = scheme_of(weight), torch.randn(20, 2048, generator=random).to(BF16)
    configs = {n: tuned.best(scheme, weight.shape, n, (9, 4), invariant=True) for n in (1, 20)}
    assert configs[1].splits > 1
    whole = emulated.linear(x, weight, None, scheme, configs[20])
    for row in (0, 7, 8, 19):
        assert torch.equal(emulated.linear(x[row : row + 1], weight, None, scheme, configs[1])[0], whole[row])


DECODED = ["int4-g128-asym", "nf4-dq", "int3-g20-asym-fz", "int8-channel-f16", "dynamic8", "int1-g32"]


@pytest.mark.parametrize("spec", DECODED)
@pytest.mark.parametrize(("outs", "columns"), [(5, 512), (3, 333), (70, 40), (2, 1)])
def test_dequantizing_equals_the_reference_bit_for_bit(spec: str, outs: int, columns: int, random: Generator):
    weight = packed(spec, outs, columns, random)
    stored = storage(weight.format)
    assert not isinstance(stored, str)
    assert torch.equal(emulated.dequantize(weight, BF16, stored), reference.dequantize(weight, BF16))


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 33, 64, 65, 1000])
@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "int8", "int2-g64", "int1-channel", "int3-g128"])
def test_every_default_fits_the_shared_memory(spec: str, rows: int):
    for outs, columns in [(4096, 4096), (128, 512), (28672, 8192), (16, 1536)]:
        scheme = stream.scheme(whit.parse_format(spec), columns)
        assert not isinstance(scheme, str)
        config, tiles = (best(scheme, (outs, columns), rows, (8, 108)) for best in (tuned.best, tuned.best_tiled))
        assert tiled.shared_bytes(scheme, tiles) <= 163 << 10
        assert stream.shared_bytes(scheme, config, rows) <= 163 << 10
        fitted = stream.fitted(config, scheme, columns)
        steps = columns // scheme.step
        assert 0 <= steps - (fitted.splits - 1) * -(-steps // fitted.splits) <= steps


@pytest.mark.parametrize(
    ("spec", "columns", "reason"),
    [
        ("int4-g128", 200, "multiples of 32"), ("int3-g64", 512, "multiples of 128"), ("fp8", 512, "neither integers"),
        ("int8-tensor", 512, "one scale"), ("codebook(-1,0,1)", 512, "9 to 16 levels"),
    ],
)  # fmt: skip
def test_it_says_what_it_cannot_run(spec: str, columns: int, reason: str):
    found = stream.scheme(whit.parse_format(spec), columns)
    assert isinstance(found, str)
    assert reason in found


def test_a_cpu_is_no_gpu(random: Generator):
    weight, x = packed("int4-g32", 8, 64, random), torch.ones(1, 64, dtype=BF16)
    assert kernel.Gpu().supports(weight, x) == "the device is cpu"
