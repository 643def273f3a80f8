"""Products by AMX's tiles, whose operations are plain loops here, against float64 and the reference.

Where a processor has AMX, test_cpu and test_cpu_int8 run the instructions.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_weights import packed
from torch import Generator, Tensor

from whit.activations import parse_activations
from whit.kernels import int8
from whit.kernels.activated import Activation8
from whit.kernels.cpu import build as builder
from whit.kernels.cpu import library
from whit.kernels.cpu.binding import TYPES, RowsPlan
from whit.kernels.cpu.rows8 import levels_of, padded
from whit.kernels.cpu.weight import exact_in, plan_weight
from whit.layouts import BITS
from whit.tensor import PackedWeight

HERE = Path(__file__).parent
COMPILED = library()
pytestmark = pytest.mark.skipif(
    isinstance(COMPILED, str) or "avx512_bf16" not in COMPILED.isas_many, reason="tiles are decoded by AVX-512"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder, compiler = tmp_path_factory.mktemp("amx"), builder.find_compiler()
    flags = [*(flag for flag in builder.FLAGS if flag != "-O2"), "-O1", "-DWHIT_EMULATE_AMX", f"-I{builder.SOURCES}"]
    have = [f"-DWHIT_HAVE_{isa.upper()}" for isa in builder.X86]

    def compiled(source: Path, more: Sequence[str]) -> str:
        out = folder / f"{source.stem}.o"
        subprocess.run([str(compiler), *flags, *more, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    sources = [(HERE / "emulate_amx.cpp", ()), *((builder.SOURCES / f"{name}.cpp", have) for name in ("amx", "tiles"))]
    for isa in ("tiles_bf16", "tiles_int8"):
        sources.append((builder.SOURCES / f"{isa}.cpp", builder.X86[isa][0]))
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(lambda one: compiled(*one), sources))
    subprocess.run([str(compiler), "-shared", *objects, "-o", str(folder / "emulated.so")], check=True)
    return ctypes.CDLL(str(folder / "emulated.so"))


def product(
    emulated: ctypes.CDLL, x: Tensor, packed: PackedWeight, bias: Tensor | None, threads: int = 1, folds: bool = False
) -> Tensor:
    assert not isinstance(COMPILED, str)
    weight = plan_weight(packed, COMPILED, move=False)
    y = torch.full((len(x), weight.shape[0]), torch.nan, dtype=x.dtype)
    pointers = [ctypes.c_void_p(p) for p in (weight.address, x.data_ptr(), bias.data_ptr() if bias is not None else 0)]
    assert emulated.tiles(*pointers, ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)), folds, threads) == 0
    return y


def product8(emulated: ctypes.CDLL, x: Tensor, packed: PackedWeight, bias: Tensor) -> Tensor:
    assert not isinstance(COMPILED, str)
    weight, how = plan_weight(packed, COMPILED, move=False), packed.activations
    assert how is not None
    levels, rows = levels_of(packed.format), int8.quantize_rows(x, False, how.symmetric)
    assert not isinstance(levels, str)
    codes = torch.nn.functional.pad(rows.codes, (0, padded(x.shape[1]) - x.shape[1])).contiguous()
    scale, sums = rows.scale.expand(len(x), 1).contiguous(), rows.codes.sum(1, keepdim=True, dtype=torch.int32)
    zero = None if rows.zero_point is None else rows.zero_point.expand(len(x), 1).to(torch.int32).contiguous()
    row_sums = BITS.unpack(packed).codes.sum(1, dtype=torch.int32)
    plan = RowsPlan(
        codes=codes.data_ptr(), scale=scale.data_ptr(), sums=sums.data_ptr(), count=len(x), stride=codes.shape[1],
        zero=None if zero is None else zero.data_ptr(), groups=1,
    )  # fmt: skip
    y = torch.full((len(x), weight.shape[0]), torch.nan, dtype=x.dtype)
    pointers = [weight.address, ctypes.addressof(plan), row_sums.data_ptr(), bias.data_ptr(), y.data_ptr()]
    status = emulated.tiles8(
        *map(ctypes.c_void_p, pointers), TYPES[x.dtype], levels.table, levels.shift, ctypes.c_float(levels.unit), 1
    )
    assert status == 0
    return y


@pytest.mark.parametrize(
    "spec",
    [
        *(f"int{bits}-g{32 << bits % 3}" for bits in range(1, 9)), "int2-g16", "int3-g48-asym", "int4-g256-asym",
        "int4-g128", "int4-g96", "int4-g64-asym-fz", "int8-g64-asym", "int4-channel", "int3-channel-asym",
        "int8-tensor", "int8-absmax", "nf4", "nf4-dq", "nf4-channel", "fp4", "fp8", "codebook(-1,0.1,1)-g32",
        "binary-g64", "q4_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "tq2_0",
    ],
)  # fmt: skip
def test_products_are_sums_of_bfloat16(emulated: ctypes.CDLL, spec: str, random: Generator):
    """Levels that are exact in bfloat16 give sums exact to float32: the bias takes off the result's own rounding."""
    for (rows, columns), count in [((1, 33), 3), ((37, 600), 17), ((85, 257), 49)]:
        weight = packed(spec, rows, columns, random)
        exact = BITS.unpack(weight).dequantize(torch.float64)
        x = torch.randn(count, columns, generator=random).bfloat16()
        x[1:] = x[0] if count == 17 else x[1:]
        bias = -(x[0].double() @ exact.T).bfloat16()
        left, size = x.double() @ exact.T + bias.double(), x.double().abs() @ exact.abs().T
        room = 1e-5 if exact_in(weight.format, torch.bfloat16) else 2**-8
        got = product(emulated, x, weight, bias).double()
        assert bool(((got - left).abs() <= room * size + 2**-8 * left.abs()).all())


@pytest.mark.parametrize(
    "spec",
    [
        "int1-g32",
        "int2-g16-asym",
        "int3-g48",
        "int4-g128",
        "int4-channel",
        "nf4-dq",
        "int5-g32",
        "int6-g64-asym",
        "int7-channel-asym",
        "int8-g32",
        "q4_k",
        "q6_k",
        "q5_1",
        "iq4_nl",
    ],
)
def test_folded_weights_are_rounded_once(emulated: ctypes.CDLL, spec: str, random: Generator):
    for rows, columns in [(37, 600), (5, 33)]:
        weight = packed(spec, rows, columns, random)
        exact = BITS.unpack(weight).dequantize(torch.float32).bfloat16().double()
        x = torch.randn(1, columns, generator=random).bfloat16().expand(33, -1).contiguous()
        bias = -(x[0].double() @ exact.T).bfloat16()
        left, size = x.double() @ exact.T + bias.double(), x.double().abs() @ exact.abs().T
        got = product(emulated, x, weight, bias, folds=True).double()
        # a weight that lies between two numbers of bfloat16 may be rounded to either where float32 rounded it first
        assert bool(((got - left).abs() <= 1e-4 * size + 2**-8 * left.abs()).all())


@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "int4-g32-asym"])
def test_neither_neighbours_nor_threads_change_a_bit(emulated: ctypes.CDLL, spec: str, random: Generator):
    weight, x = packed(spec, 700, 320, random), torch.randn(33, 320, generator=random).bfloat16()
    y = product(emulated, x, weight, None)
    for threads in (2, 3, 16):
        assert torch.equal(product(emulated, x, weight, None, threads), y)
    assert torch.equal(product(emulated, x, replace(weight), None), y)
    if spec != "nf4":  # whose scales are multiplied in where there are more than 32 rows
        assert torch.equal(product(emulated, x[:16].contiguous(), weight, None), y[:16])


def test_more_rows_than_meet_strips_at_a_time(emulated: ctypes.CDLL, random: Generator):
    for spec in ("int4-g32-asym", "nf4", "int4-channel"):
        weight, x = packed(spec, 21, 96, random), torch.randn(530, 96, generator=random).bfloat16()
        few = torch.cat([product(emulated, part.contiguous(), weight, None) for part in x.split(265)])
        assert torch.equal(product(emulated, x, weight, None), few)


@pytest.mark.parametrize(
    "spec", ["int8", "int8-absmax", "int8-tensor", *(f"int{bits}-channel" for bits in (2, 3, 4, 5, 6))]
)
@pytest.mark.parametrize("how", ["int8", "int8-asym"])
def test_bytes_give_the_references_bits(emulated: ctypes.CDLL, spec: str, how: str, random: Generator):
    # Weights of bytes are tiles as they lie: strips of one, two and four, and one that is copied.
    for (rows, columns), count in [((1, 1), 3), ((37, 600), 17), ((85, 1100), 49), ((200, 64), 5), ((40, 72), 150)]:
        weight = replace(packed(spec, rows, columns, random), activations=parse_activations(how))
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(count, columns, generator=random).to(dtype)
            bias = torch.randn(rows, generator=random).to(dtype)
            wanted = Activation8().linear(x, weight, bias)
            if spec.startswith("int8"):
                assert torch.equal(product8(emulated, x, weight, bias), wanted)
            else:
                torch.testing.assert_close(product8(emulated, x, weight, bias), wanted)


@pytest.mark.parametrize(("spec", "count"), [("int8", 6), ("int8", 75), ("int8", 5300), ("int4-channel", 20)])
def test_rows_are_quantized_where_they_become_tiles(emulated: ctypes.CDLL, spec: str, count: int, random: Generator):
    """5,300 rows are more than the second cache holds: bytes too are strips that are decoded then."""
    assert not isinstance(COMPILED, str)
    weight = replace(packed(spec, 70, 200, random), activations=parse_activations("int8"))
    x, levels = torch.randn(count, 200, generator=random), levels_of(weight.format)
    assert not isinstance(levels, str)
    plan, y = plan_weight(weight, COMPILED, move=False), torch.full((count, 70), torch.nan)
    status = emulated.linear8(
        ctypes.c_void_p(plan.address), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(count),
        ctypes.c_void_p(y.data_ptr()), levels.table, levels.shift, ctypes.c_float(levels.unit),
    )  # fmt: skip
    assert status == 0
    torch.testing.assert_close(y, Activation8().linear(x, weight, None), rtol=1e-6, atol=1e-6)


def test_the_largest_products_do_not_saturate(emulated: ctypes.CDLL):
    weight = packed("int8", 3, 4096, torch.Generator().manual_seed(0))
    for code in (0, 255):
        tensors = {**weight.tensors, "codes": torch.full_like(weight.tensors["codes"], code)}
        extreme = replace(weight, tensors=tensors, activations=parse_activations("int8"))
        x, bias = torch.ones(5, 4096), torch.zeros(3)
        assert torch.equal(product8(emulated, -x, extreme, bias), Activation8().linear(-x, extreme, bias))
