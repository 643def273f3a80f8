"""Rotated formats against an explicit Hadamard matrix: codes, methods, products, static ranges, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import whit
from whit import GPTQ, RTN, parse_format
from whit.activations import parse_activations
from whit.calibration.ranges import RangeWatch, input_tensors
from whit.errors import FormatError
from whit.kernels import explain, packed_linear, select
from whit.kernels.activated import Activation8
from whit.kernels.reference import Reference
from whit.kernels.rotated import Rotation
from whit.layouts import BITS
from whit.methods.lowrank import beside
from whit.modules import QuantizedLinear
from whit.rotation import SIZES, rotate, rotate_exactly
from whit.tensor import LayerStats, PackedWeight


def sylvester(size: int) -> Tensor:
    """By its closed form: the sign of an entry is the parity of the bits that its two indices share."""
    signs = [[1 - 2 * (bin(i & j).count("1") % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def whole(columns: int, size: int) -> Tensor:
    return torch.block_diag(*[sylvester(size)] * (columns // size))


def packed(weight: Tensor, spec: str, how: str | None) -> PackedWeight:
    return replace(
        BITS.pack(whit.quantize_tensor(weight, spec)), activations=None if how is None else parse_activations(how)
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_the_hadamard_matrix_and_its_own_inverse(size: int, random: torch.Generator):
    x = torch.randn(7, 512, generator=random)
    expected = x.double() @ whole(512, size)
    torch.testing.assert_close(rotate(x, size).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rotate_exactly(x, size), expected.float())
    torch.testing.assert_close(rotate(rotate(x, size), size), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(rotate_exactly(x[:3], size), rotate_exactly(x, size)[:3])


@pytest.mark.parametrize("spec", ["int8+h64", "int4-g64-asym+h16", "nf4+h64", "int8-absmax+h256"])
def test_codes_are_those_of_the_rotated_matrix(spec: str, random: torch.Generator):
    weight, base = torch.randn(24, 256, generator=random), spec.partition("+")[0]
    turn = whole(256, parse_format(spec).rotation)
    found, plain = whit.quantize_tensor(weight, spec), whit.quantize_tensor((weight.double() @ turn).float(), base)
    assert torch.equal(found.codes, plain.codes)
    assert str(parse_format(str(found.format))) == str(found.format)
    torch.testing.assert_close(found.dequantize(), (plain.dequantize().double() @ turn).float(), rtol=1e-5, atol=1e-6)
    stored = BITS.pack(found)
    assert {k: v.shape for k, v in stored.tensors.items()} == {k: v.shape for k, v in BITS.pack(plain).tensors.items()}
    assert torch.equal(BITS.unpack(stored).dequantize(), found.dequantize())
    assert torch.equal(found.format.encode(found.dequantize(), found.params), found.codes)


def test_gptq_chooses_codes_in_the_rotated_basis(random: torch.Generator):
    weight, mixing = torch.randn(32, 128, generator=random), torch.randn(128, 128, generator=random)
    x, turn = torch.randn(400, 128, generator=random) @ mixing, whole(128, 64)
    stats, format = LayerStats(x.T @ x, len(x)), parse_format("int3-g64+h64")
    found = beside(GPTQ())(weight, stats, format)
    turned = (x.double() @ turn).float()
    expected = GPTQ()((weight.double() @ turn).float(), LayerStats(turned.T @ turned, len(x)), parse_format("int3-g64"))
    assert float((found.codes != expected.codes).float().mean()) < 0.01  # the two hessians differ in their last bits
    lost = [float(((near.dequantize() - weight) @ x.T).square().sum()) for near in (found, RTN()(weight, None, format))]
    assert lost[0] < 0.7 * lost[1]


@pytest.mark.parametrize("how", ["int8", "int8-asym", "int8-outliers2", "int8-g32", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_rotated_inputs(how: str | None, dtype: torch.dtype, random: torch.Generator):
    weight, x = torch.randn(48, 192, generator=random), torch.randn(5, 192, generator=random)
    x[:, 7] *= 40
    x, bias = x.to(dtype), torch.randn(48, generator=random).to(dtype)
    stored = packed(weight, "int8+h64", how)
    plain = replace(packed((weight.double() @ whole(192, 64)).float(), "int8", how))
    kernel = Reference() if how is None else Activation8()
    expected = kernel.linear((x.double() @ whole(192, 64)).to(dtype), plain, bias).double()
    found = packed_linear(x, stored, bias)
    assert found.dtype == dtype
    scale = expected.abs().max()
    step = 2**-7 if dtype == torch.bfloat16 else 1e-5
    # an input that falls between two codes may fall to either side
    assert float((found.double() - expected).abs().max() / scale) < step + (0.003 if how else 0)
    chosen = select(stored, x)
    assert isinstance(chosen, Rotation if how else Rotation | Reference)  # without compiled kernels floats need none
    assert torch.equal(chosen.linear(x, chosen.prepare(stored), bias), found)
    reasons = dict(explain(stored, x))
    assert reasons[chosen.name] == "used"
    if how is not None:
        assert "rotated" in reasons["reference-8bit"]


def test_an_outlier_channel_costs_little_after_a_rotation(random: torch.Generator):
    weight, x = torch.randn(48, 256, generator=random), torch.randn(64, 256, generator=random)
    x[:, 100] *= 60
    exact, lost = x @ weight.T, {}
    for spec in ("int8", "int8+h64"):
        near = packed_linear(x, packed(weight, spec, "int8"), None)
        lost[spec] = float((near - exact).square().sum())
    assert lost["int8+h64"] < 0.1 * lost["int8"]


def test_static_ranges_are_those_of_rotated_inputs(random: torch.Generator):
    weights = {name: torch.randn(8, 128, generator=random) for name in ("plain", "turned", "also")}
    watch, x = RangeWatch(weights, 0.1, {"turned": 64, "also": 64}), torch.randn(30, 128, generator=random)
    with watch:
        for weight in weights.values():
            torch.nn.functional.linear(x, weight)
    turned = x.double() @ whole(128, 64)
    for name, seen in (("plain", x), ("turned", turned), ("also", turned)):
        scale = input_tensors(watch.found[name], parse_activations("int8-static"))["input_scale"]
        assert float(scale) == pytest.approx(float(seen.abs().max()) / 127, rel=1e-5)
    assert watch.found["also"] is watch.found["turned"]


def test_online_ranges_follow_rotated_inputs(random: torch.Generator):
    quantized = whit.quantize_tensor(torch.randn(8, 128, generator=random), "int8+h64")
    stored = replace(BITS.pack(quantized), activations=parse_activations("int8-static"))
    stored = replace(stored, tensors={**stored.tensors, "input_scale": torch.ones(1)})
    linear, x = QuantizedLinear(stored), torch.randn(30, 128, generator=random)
    with whit.track_ranges(torch.nn.Sequential(linear), momentum=1.0):
        linear(x)
    largest = float((x.double() @ whole(128, 64)).abs().max())
    assert float(linear.packed.tensors["input_scale"]) == pytest.approx(largest / 127, rel=1e-5)


def test_gradients_are_those_of_the_float_product(random: torch.Generator):
    linear = QuantizedLinear(packed(torch.randn(24, 128, generator=random), "int8+h64", "int8"))
    x = torch.randn(3, 128, generator=random, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dequantize().sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("int8+h8", "must be one of"),
        ("int8+h128", "must be one of"),
        ("int4-g32+h64", "multiples of the rotation"),
        ("bf16+h64", "plain format"),
        ("int8+h64+h64", "plain format"),
        ("int2-g64+r16+h64", "plain format"),
        ("int2-g64+h64+r16", "choose one of the two"),
        ("int4-g64-act+h64", "plain format"),
        ("bands(q5_k:1024,q2_k)+h64", "plain format"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, why: str):
    with pytest.raises(FormatError, match=why):
        parse_format(spec)


def test_columns_that_the_rotation_does_not_divide_are_refused():
    with pytest.raises(FormatError, match="100 columns; a rotation turns 64"):
        whit.quantize_tensor(torch.ones(4, 100), "int8+h64")
