"""One or two rows of bfloat16 as sums of bytes, as processors with AMX take them, on any with VNNI: against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from random_weights import packed
from torch import Generator, Tensor

from whit.kernels.cpu import build as builder
from whit.kernels.cpu import library
from whit.kernels.cpu.binding import ISAS
from whit.kernels.cpu.weight import plan_weight
from whit.layouts import BITS
from whit.tensor import PackedWeight

COMPILED = library()
NOT_FOR_THESE = -1
pytestmark = pytest.mark.skipif(
    isinstance(COMPILED, str) or "avx512_vnni" not in COMPILED.isas8, reason="bytes are multiplied by AVX-512 VNNI"
)


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, threads: int = 1) -> Tensor | int:
    """y, or what the library says where this is none of its products."""
    assert not isinstance(COMPILED, str)
    weight = plan_weight(packed, COMPILED, move=False)
    y = torch.full((len(x), weight.shape[0]), torch.nan, dtype=x.dtype)
    pointers = [weight.address, x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()]
    handle = ctypes.CDLL(str(builder.LIBRARY))
    status: int = handle.whit_planes(
        *map(ctypes.c_void_p, pointers), ctypes.c_int64(len(x)), ISAS.index("amx"), ctypes.c_int(threads)
    )
    return status or y


def check(x: Tensor, weight: PackedWeight, room: float = 1e-5) -> None:
    """The bias takes off the result's own rounding, so that what is left shows the sums."""
    exact = BITS.unpack(weight).dequantize(torch.float64)
    bias = -(x[0].double() @ exact.T).bfloat16()
    left, size = x.double() @ exact.T + bias.double(), x.double().abs() @ exact.abs().T
    got = product(x, weight, bias)
    assert isinstance(got, Tensor)
    assert bool(((got.double() - left).abs() <= room * size + 2**-8 * left.abs()).all())


@pytest.mark.parametrize(
    "spec",
    [
        *(f"int{bits}-g{group}" for bits in (2, 3, 4) for group in (16, 32, 64, 128, 256)),
        "int2-g64-asym", "int3-g32-asym", "int4-g128-asym", "int4-g64-asym-fz", "int4-g128-f32", "int4-channel",
        "int3-channel-asym", "int2-channel", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k",
    ],
)  # fmt: skip
def test_products_are_exact_to_float32(spec: str, random: Generator):
    for (rows, columns), count in [((1, 256), 1), ((37, 768), 2), ((9, 512), 2), ((83, 2048), 2)]:
        x = torch.randn(count, columns, generator=random)
        x[-1, ::37] *= 50  # by which those beside them need a third byte
        check(x.bfloat16(), packed(spec, rows, columns, random))


@pytest.mark.parametrize("columns", [1, 31, 33, 130, 600])
@pytest.mark.parametrize("spec", ["int2-g64", "int3-g128", "int4-g32-asym", "int4-channel"])
def test_widths_are_free(spec: str, columns: int, random: Generator):
    check(torch.randn(2, columns, generator=random).bfloat16(), packed(spec, 11, columns, random))


@pytest.mark.parametrize("size", [1e-30, 1.0, 255.0, 1e30])
def test_sizes_are_free(size: float, random: Generator):
    """255 is the one number of eight bits that three signed bytes hold only when it is moved."""
    x = (torch.randn(2, 512, generator=random) * size).bfloat16()
    x[0, ::2] = size
    x[1, 32:64] = 0
    check(x, packed("int4-g128", 20, 512, random))
    check(torch.zeros(2, 512).bfloat16(), packed("int4-g128", 20, 512, random))


@pytest.mark.parametrize("peaks", [False, True])
@pytest.mark.parametrize("spec", ["q4_k", "int3-g128", "int2-g64"])
def test_threads_and_company_change_nothing(spec: str, peaks: bool, random: Generator):
    x, weight = torch.randn(2, 1024, generator=random).bfloat16(), packed(spec, 300, 1024, random)
    if peaks:
        x[1, ::37] *= 50
    alone = product(x, weight)
    assert isinstance(alone, Tensor)
    for threads in (2, 3, 4):
        assert torch.equal(product(x, weight, threads=threads), alone)  # type: ignore[arg-type]
    for row in range(2):
        assert torch.equal(product(x[row : row + 1], weight), alone[row : row + 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["nf4", "int5-g64", "int8-channel", "ternary", "int4-g48", "codebook(-1,1)-g32"])
def test_other_formats_are_not_for_these(spec: str, random: Generator):
    assert product(torch.ones(1, 512).bfloat16(), packed(spec, 4, 512, random)) == NOT_FOR_THESE


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan, 1e-36])
def test_numbers_that_are_no_sums_of_bytes_are_left_to_floats(number: float, random: Generator):
    x = torch.zeros(2, 128).bfloat16()
    x[1, 70] = number
    assert product(x, packed("int4-g128", 4, 128, random)) == NOT_FOR_THESE
    assert product(torch.ones(3, 128).bfloat16(), packed("int4-g128", 4, 128, random)) == NOT_FOR_THESE
