"""The compiled CPU kernels against float64 and the reference: formats, shapes, rows, threads, instruction sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_weights import packed
from torch import Generator, Tensor

import whit
from whit.errors import CheckpointError
from whit.kernels import packed_linear, packed_linear_op, select
from whit.kernels.cpu import Cpu, library
from whit.kernels.reference import Reference, dequantize
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

GROUPED = [f"int{bits}-g{group}" for bits in range(1, 9) for group in (16, 32, 64, 128, 256)]
OTHER = [
    *(f"int{bits}-g32-asym" for bits in range(1, 9)), *(f"int{bits}-channel" for bits in range(1, 9)),
    "int8-tensor", "int8-absmax", "int4-g64-asym-fz", "int8-g64-asym-fz", "int4-g48", "int2-g96-asym", "int4-g128-f16",
    "int4-g128-f32", "int3-channel-asym", "nf4", "nf4-g16", "nf4-dq", "nf4-g128-dq", "nf4-channel", "fp4", "fp8",
    "dynamic8-g64", "codebook(-1,-0.3,0.3,0.5,1)-g64", "codebook(-1,1)-g32", "codebook(-1,0.1,1)-g256",
    "binary-g64", "binary", "ternary-g64", "ternary-g48", "ternary", "ternary-tensor-absmean",
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq2_0",
    "mxfp4",
]  # fmt: skip
COMPILED = library()
ISAS_HERE = () if isinstance(COMPILED, str) else COMPILED.isas
# float32 sums of float32 or bfloat16 products, relative to the sum of magnitudes; then the output's own rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

pytestmark = pytest.mark.skipif(isinstance(COMPILED, str), reason=f"CPU kernels: {COMPILED}")


@pytest.fixture(params=ISAS_HERE)
def kernel(request: pytest.FixtureRequest) -> Cpu:
    return Cpu(request.param)


def check(got: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, tolerance: float) -> None:
    exact = BITS.unpack(weight).dequantize(torch.float64)
    wanted, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    if bias is not None:
        wanted, size = wanted + bias.double(), size + bias.double().abs()
    assert bool(((got.double() - wanted).abs() <= tolerance * size + 1e-30).all())


@pytest.mark.parametrize("spec", GROUPED + OTHER)
def test_dequantizes_to_the_references_bits(kernel: Cpu, spec: str, random: Generator):
    for rows, columns in [(3, 33), (5, 257), (2, 640)]:
        weight = packed(spec, rows, columns, random)
        for dtype in TOLERANCE:
            assert torch.equal(kernel.dequantize(weight, dtype), dequantize(weight, dtype))


@pytest.mark.parametrize("spec", GROUPED + OTHER)
def test_products_are_exact_to_float32(kernel: Cpu, spec: str, random: Generator):
    for (rows, columns), batch in [((1, 1), 1), ((7, 33), 3), ((5, 257), 1), ((10, 640), 9)]:
        weight = packed(spec, rows, columns, random)
        assert kernel.supports(weight, torch.ones(1, columns)) is None
        for dtype, tolerance in TOLERANCE.items():
            x = torch.randn(batch, columns, generator=random).to(dtype)
            bias = torch.randn(rows, generator=random).to(dtype)
            # one-bit asymmetric groups and digits are sums of few values against large zero points
            slack = 4 if "int1" in spec or "ternary" in spec else 1
            check(kernel.linear(x, weight, bias), x, weight, bias, slack * tolerance)


def test_digits_are_the_references_whatever_the_byte(kernel: Cpu):
    """All 243 bytes of five digits, in rows that end within vectors of every width, above rows of other bytes."""
    for columns in (5, 80, 243 * 5, 243 * 5 - 3):
        codes = torch.arange(243, dtype=torch.uint8).repeat(9)[: 7 * -(-columns // 5)].reshape(7, -1)
        weight = BITS.pack(whit.quantize_tensor(torch.randn(7, columns), "ternary"))
        weight = replace(weight, tensors={**weight.tensors, "codes": codes.contiguous()})
        assert torch.equal(kernel.dequantize(weight, torch.float32), dequantize(weight))
    tiles = BITS.pack(whit.quantize_tensor(torch.randn(300, 4096), "ternary-g64"))  # of more rows than a tile
    assert torch.equal(kernel.dequantize(tiles, torch.bfloat16, 5, 299), dequantize(tiles, torch.bfloat16)[5:299])
    wrong = replace(weight, tensors={**weight.tensors, "codes": codes.clone().fill_(243)})
    with pytest.raises(CheckpointError, match="a byte is 243"):
        kernel.linear(torch.ones(1, columns), wrong, None)


@pytest.mark.parametrize("spec", ["int4-g32", "nf4-g32", "int8-g64-asym", "int3-g64", "int2-g128", "ternary-g32"])
def test_any_number_of_rows(kernel: Cpu, spec: str, random: Generator):
    weight = packed(spec, 37, 288, random)
    for dtype, tolerance in TOLERANCE.items():
        x = torch.randn(65, 288, generator=random).to(dtype)
        for rows in (*range(1, 20), 32, 33, 64, 65):
            # many rows multiply by weights rounded to the activations' type, as the reference does
            slack = 4 if rows > 16 else 1
            check(kernel.linear(x[:rows], weight, None), x[:rows], weight, None, slack * tolerance)
    assert kernel.linear(torch.ones(0, 288), weight, None).shape == (0, 37)
    assert kernel.linear(torch.ones(2, 3, 288), weight, None).shape == (2, 3, 37)
    assert kernel.linear(torch.ones(288), weight, None).shape == (37,)


@pytest.mark.parametrize(
    "spec",
    [
        "int1-g64",
        "int2-g128",
        "int2-g32-asym",
        "int3-g64",
        "int4-g128",
        "nf4",
        "q2_k",
        "q4_k",
        "int5-g32",
        "int6-g64-asym",
        "int8",
        "int8-g64-asym",
        "q6_k",
        "q8_0",
    ],
)
def test_sums_of_bfloat16_are_exact_to_float32(kernel: Cpu, spec: str, random: Generator):
    """The bias takes off the result's own rounding; inputs of one sign are the worst for levels that were moved up."""
    assert not isinstance(COMPILED, str)
    weight = packed(spec, 37, 640, random)
    exact = BITS.unpack(weight).dequantize(torch.float64)
    for x in (torch.randn(17, 640, generator=random), torch.rand(17, 640, generator=random) + 1):
        x = x.bfloat16()
        bias = -(x[0].double() @ exact.T).bfloat16()
        for rows in (1, 2, 4, 5, 16, 17):
            if rows > 4 and (spec == "nf4" or kernel.isa not in COMPILED.isas_many):
                continue  # more rows meet levels or weights rounded to bfloat16
            got = kernel.linear(x[:1].expand(rows, -1), weight, bias).double()
            left = x[0].double() @ exact.T + bias.double()
            size = x[0].double().abs() @ exact.abs().T
            assert bool(((got - left).abs() <= 1e-5 * size + 2**-8 * left.abs()).all())


@pytest.mark.parametrize("spec", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "q4_1"])
def test_rows_of_many_superblocks(kernel: Cpu, spec: str, random: Generator):
    """Params are converted for 16 superblocks at a time: one, two and some of these, in rows of inputs 1 to 3."""
    for supers in (15, 16, 17, 35):
        weight, x = packed(spec, 5, 256 * supers, random), torch.randn(3, 256 * supers, generator=random)
        for rows in (1, 3):
            check(kernel.linear(x[:rows], weight, None), x[:rows], weight, None, TOLERANCE[torch.float32])
            few = x[:rows].bfloat16()
            check(kernel.linear(few, weight, None), few, weight, None, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("spec", ["int4-g128", "nf4-dq", "int3-g64-asym", "int8", "q4_k", "q2_k"])
def test_the_number_of_threads_changes_no_bit(kernel: Cpu, spec: str, random: Generator, threads: None):
    weight = packed(spec, 700, 512, random)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 512, generator=random).to(dtype)
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(kernel.linear(x, weight, None))
        assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("spec", ["int4-g32", "int3-g32-asym", "nf4", "int8"])
def test_pointers_need_no_alignment(kernel: Cpu, spec: str, random: Generator):
    weight, x = packed(spec, 9, 160, random), torch.randn(2, 160, generator=random)

    def moved(tensor: Tensor, offset: int) -> Tensor:
        flat = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:]
        return flat.reshape(tensor.shape).copy_(tensor)

    for offset in (1, 3):
        tensors = {key: moved(tensor, offset) for key, tensor in weight.tensors.items()}
        other = PackedWeight(weight.layout, weight.format, weight.shape, tensors)
        assert torch.equal(kernel.linear(moved(x, offset), other, None), kernel.linear(x, weight, None))


def test_activations_may_have_any_strides(kernel: Cpu, random: Generator):
    weight, x = packed("int4-g32", 9, 64, random), torch.randn(64, 3, generator=random)
    assert torch.equal(kernel.linear(x.T, weight, None), kernel.linear(x.T.contiguous(), weight, None))


def test_is_what_runs_here_and_says_what_it_cannot(random: Generator):
    x = torch.ones(1, 64)
    assert select(packed("int4-g64", 8, 64, random), x).name == "cpu"
    for spec, dtype, reason in [
        ("int4-g8", torch.float32, "groups of 8 columns"), ("bf16", torch.float32, "not a format of up to 8 bits"),
        ("dynamic8-g64-centered", torch.float32, "offset"), ("int4-g64", torch.float64, "activations are"),
    ]:  # fmt: skip
        weight = packed(spec, 8, 64, random)
        assert reason in (Cpu().supports(weight, x.to(dtype)) or "")
        assert select(weight, x.to(dtype)).name == "reference"
    assert "does not run" in (Cpu("none").supports(packed("int8", 8, 64, random), x) or "")


def test_gradients_are_those_of_the_reference(random: Generator):
    weight = packed("nf4", 24, 128, random)
    x = torch.randn(3, 128, generator=random, requires_grad=True)
    g = torch.randn(3, 24, generator=random)
    ours = torch.autograd.grad(packed_linear(x, weight, None, Cpu()), x, g)[0]
    theirs = torch.autograd.grad(packed_linear(x, weight, None, Reference()), x, g)[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole(backend: str, random: Generator):
    layers = [("int4-g32-asym", 64, 96), ("nf4-dq", 32, 64)]
    model = torch.nn.Sequential(
        *(
            QuantizedLinear.from_quantized(
                whit.quantize_tensor(torch.randn(rows, columns, generator=random), spec),
                torch.nn.Parameter(torch.randn(rows, generator=random)),
            )
            for spec, rows, columns in layers
        )
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 96, generator=random, requires_grad=True)
        torch.testing.assert_close(compiled(x), model(x))
        grads = [torch.autograd.grad(m(x).square().sum(), [x, model[0].bias]) for m in (compiled, model)]
        for ours, eager in zip(*grads, strict=True):
            torch.testing.assert_close(ours, eager)
    torch._dynamo.reset()


def test_the_operator_keeps_torchs_contract(random: Generator):
    weight = packed("int4-g32", 8, 64, random)
    x = torch.randn(2, 64, generator=random, requires_grad=True)
    names = ",".join(weight.tensors), weight.layout, str(weight.format), list(weight.shape)
    torch.library.opcheck(packed_linear_op, (x, list(weight.tensors.values()), torch.ones(8), *names))
