"""The functions that define products of 8-bit activations, against short references in float64 and bitsandbytes."""

from __future__ import annotations

import copy

import pytest
import torch

from whit.activations import Activations, parse_activations
from whit.arrays import quantize_tensor
from whit.errors import RecipeError
from whit.kernels import KERNELS, int8, packed_arguments, packed_linear, packed_linear_op, select
from whit.kernels.activated import Activation8, operands
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

ROWS, COLUMNS, OUT = 5, 64, 24


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(how: str, spec: str = "int8", seed: int = 1, **static: torch.Tensor) -> PackedWeight:
    plain = BITS.pack(quantize_tensor(numbers(OUT, COLUMNS, seed=seed), spec))
    tensors = {**plain.tensors, **static}
    return PackedWeight(plain.layout, plain.format, plain.shape, tensors, activations=parse_activations(how))


@pytest.mark.parametrize(
    "spec",
    ["int8", "int8-tensor", "int8-asym", "int8-tensor-asym", "int8-outliers", "int8-outliers4.5", "int8-static",
     "int8-outliers6.1234567", "int8-outliers0.00001", "int8-static-moving0.00002",
     "int8-static-percentile99.9", "int8-static-mse-asym", "int8-static-moving0.1", "int8-exact8",
     "int8-g32-exact4", "fp8", "fp8-tensor", "fp8-static"],
)  # fmt: skip
def test_shorthands_come_back(spec):
    how = parse_activations(spec)
    assert str(how) == spec
    assert parse_activations(how.to_dict()) == how


@pytest.mark.parametrize(
    "wrong",
    [
        "int4",
        "int8-static-token",
        "fp8-asym",
        "int8-static-mse3",
        "int8-outliers-asym",
        "int8-exact8-asym",
        "int8-tensor-exact2",
        "fp8-exact2",
        "int8-exact0",
    ],
)
def test_what_is_no_activations_is_refused(wrong):
    with pytest.raises(RecipeError):
        parse_activations(wrong)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, "6"])
def test_a_threshold_is_a_number(wrong):
    """NaN would take no column for an outlier, in silence."""
    with pytest.raises(RecipeError, match="threshold"):
        Activations(threshold=wrong)


def test_rows_are_rounded_to_the_nearest_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    rows = int8.quantize_rows(x)
    assert rows.codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]
    assert rows.scale.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_no_value_moves_by_more_than_half_a_step(symmetric, per_tensor):
    x = numbers(ROWS, COLUMNS) + 0.7
    codes, scale, zero = int8.quantize_rows(x, per_tensor, symmetric)
    near = (codes.double() - (0 if zero is None else zero.double())) * scale.double()
    # a rounded zero point shifts the ends of the range by up to half a step more
    assert ((near - x).abs() <= scale * (0.501 if symmetric else 1.001)).all()


def test_the_product_is_torchs_int_mm():
    codes = torch.randint(-128, 128, (ROWS, COLUMNS)).to(torch.int8)
    weight = torch.randint(-128, 128, (OUT, COLUMNS)).to(torch.int8)
    assert torch.equal(int8.int_product(codes, weight), (codes.long() @ weight.long().T).int())
    assert torch.equal(int8.int_product(codes, weight), torch._int_mm(codes, weight.T.contiguous()))


@pytest.mark.parametrize("out", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 33, 64])
@pytest.mark.parametrize("rows", [1, 2, 17, 65])
def test_sums_are_exact_whatever_the_shape(rows, columns, out):
    codes = torch.randint(-128, 128, (rows, columns)).to(torch.int8)
    weight = torch.randint(-128, 128, (out, columns)).to(torch.int8)
    expected = codes.long() @ weight.long().T
    assert torch.equal(int8.int_product(codes, weight).long(), expected)
    strided = torch.stack([weight, weight], dim=2)[:, :, 0]
    assert torch.equal(int8.int_product(codes, strided).long(), expected)


@pytest.mark.parametrize("how", ["int8", "int8-asym", "int8-tensor", "int8-tensor-asym"])
@pytest.mark.parametrize("spec", ["int8", "int8-absmax", "int8-tensor", "int4-channel"])
def test_dynamic_is_the_product_of_what_the_codes_stand_for(how, spec):
    x, weight, bias = numbers(2, ROWS, COLUMNS) + 0.3, packed(how, spec), numbers(OUT, seed=3)
    known = parse_activations(how)
    codes, scale, zero = int8.quantize_rows(x.reshape(-1, COLUMNS), known.granularity == "tensor", known.symmetric)
    near = (codes.double() - (0 if zero is None else zero)) * scale.double()
    expected = near @ BITS.unpack(weight).dequantize().double().T + bias
    torch.testing.assert_close(packed_linear(x, weight, bias).double().reshape(-1, OUT), expected, rtol=1e-5, atol=1e-5)


def test_threshold_zero_is_the_integer_product_and_nothing_else():
    x, weight = numbers(ROWS, COLUMNS), packed("int8-outliers", "int8-absmax")
    pure = PackedWeight(
        weight.layout, weight.format, weight.shape, weight.tensors, activations=Activations(threshold=0.0)
    )
    codes, scale, _ = int8.quantize_rows(x)
    matrix, row_scale = operands(weight)
    exact = torch._int_mm(codes, matrix.T.contiguous())
    assert torch.equal(packed_linear(x, pure), exact.float() * scale * row_scale.T)


@pytest.mark.parametrize("low", [-torch.inf, -0.125])
@pytest.mark.parametrize("how", ["int8-exact2", "int8-g32-exact2"])
def test_exact_columns_are_not_rounded(how, low):
    x = numbers(ROWS, COLUMNS)
    x = x if low == -torch.inf else x.clamp(min=2 * low)
    x[:, [3, COLUMNS - 1]] *= 1000
    given = {"input_columns": torch.tensor([3, COLUMNS - 1], dtype=torch.int32), "input_low": torch.tensor([low])}
    weight, size = packed(how, **given), 32 if "g32" in how else COLUMNS
    near = x.double().clone()
    for row in near:
        for first in range(0, COLUMNS, size):
            kept = [c for c in range(first, min(first + size, COLUMNS)) if c not in (3, COLUMNS - 1)]
            values = row[kept] if low == -torch.inf else (row[kept] - low).clamp(min=0)
            step = values.abs().max() / (127 if low == -torch.inf else 255)
            row[kept] = (values / step).round() * step + (0 if low == -torch.inf else low)
    expected = near @ BITS.unpack(weight).dequantize().double().T
    for kernel in (Activation8(), None):
        found = packed_linear(x, weight, None, kernel).double()
        assert (found - expected).norm() < 2e-4 * expected.norm()  # a value between two codes may fall either way


@pytest.mark.parametrize("asym", ["", "-asym"])
def test_static_scales_are_those_of_the_weight(asym):
    x = numbers(ROWS, COLUMNS).clamp(-2, 2)
    zero = {"input_zero_point": torch.tensor([-3], dtype=torch.int8)} if asym else {}
    weight = packed(f"int8-static{asym}", input_scale=torch.tensor([2 / 124]), **zero)
    steps = torch.round(x.double() * 62)
    assert steps.abs().max() <= 124
    expected = (steps * (2 / 124)) @ BITS.unpack(weight).dequantize().double().T
    torch.testing.assert_close(packed_linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["fp8", "fp8-tensor"])
@pytest.mark.parametrize("spec", ["fp8", "fp8-tensor"])
def test_fp8_is_the_product_of_what_the_codes_stand_for(how, spec):
    x, weight = numbers(ROWS, COLUMNS), packed(how, spec)
    absmax = x.abs().amax(dim=1, keepdim=True) if how == "fp8" else x.abs().max()
    near = (x * (448 / absmax)).to(torch.float8_e4m3fn).double() * (absmax.double() / 448)
    expected = near @ BITS.unpack(weight).dequantize().double().T
    torch.testing.assert_close(packed_linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["int8", "int8-asym", "int8-outliers", "fp8"])
def test_a_row_that_is_not_finite_comes_out_so_and_no_other(how):
    x, weight = numbers(ROWS, COLUMNS), packed(how, "fp8" if how == "fp8" else "int8")
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    y = packed_linear(x, weight)
    assert not torch.isfinite(y[1:3]).any()
    assert torch.isfinite(y[[0, 3, 4]]).all()


def test_outlier_columns_are_not_rounded():
    x = numbers(ROWS, COLUMNS)
    x[2, 7] = 60.0
    bulk = x.clone()
    bulk[:, 7] = 0
    weight = packed("int8-outliers", "int8-absmax")
    floats = BITS.unpack(weight).dequantize()
    codes, scale, _ = int8.quantize_rows(bulk)
    expected = (codes.float() * scale) @ floats.T + x[:, 7:8] @ floats[:, 7:8].T
    torch.testing.assert_close(packed_linear(x, weight), expected, rtol=1e-5, atol=1e-5)
    pure = packed_linear(x, packed("int8", "int8-absmax"))
    assert (pure - x @ floats.T)[2].norm() > 5 * (expected - x @ floats.T)[2].norm()


def test_bitsandbytes_agrees_within_int8_rounding():
    bnb = pytest.importorskip("bitsandbytes")
    weight = numbers(OUT, COLUMNS, seed=1, dtype=torch.float16)
    x = numbers(ROWS, COLUMNS, dtype=torch.float16)
    x[:, [3, 17, 40]] *= 30  # planted outlier columns
    theirs = bnb.nn.Linear8bitLt(COLUMNS, OUT, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to("cpu").eval()
    y = theirs(x.clone()).float()
    how = parse_activations("int8-outliers")
    plain = BITS.pack(quantize_tensor(weight.float(), "int8-absmax"))
    mine = packed_linear(x, PackedWeight(plain.layout, plain.format, plain.shape, plain.tensors, activations=how))
    exact = x.float() @ weight.float().T
    bulk = x.float()
    bulk[:, [3, 17, 40]] = 0
    # theirs leaves what is below the threshold in outlier columns in a row's range: a coarser step, other roundings
    step = torch.where(x.abs() < 6, x, 0).float().abs().amax(1, keepdim=True) / 127
    rounding = 3 * step * weight.float().norm(dim=1) / 6**0.5  # three deviations of the difference of two roundings
    sixteen = 2**-10 * (exact.abs() + (exact - bulk @ weight.float().T).abs())  # they add the two parts in fp16
    bound = rounding + sixteen
    assert ((mine.float() - y).abs() <= bound).all()
    assert (mine.float() - exact).norm() <= 1.05 * (y - exact).norm()


@pytest.mark.parametrize("how", ["int8", "int8-tensor", "int8-tensor-asym", "int8-g32", "int8-outliers"])
def test_no_rows_give_no_rows(how):
    weight = packed(how)
    for kernel in (select(weight, numbers(1, COLUMNS)), Activation8()):
        for shape in ((0, COLUMNS), (2, 0, COLUMNS)):
            assert kernel.linear(torch.empty(shape), weight, None).shape == (*shape[:-1], OUT)
    rotated = packed("int8", "int8+h64")
    assert packed_linear(torch.empty(2, 0, COLUMNS), rotated).shape == (2, 0, OUT)
    eight = packed("fp8-tensor", "fp8-tensor")
    assert packed_linear(torch.empty(0, COLUMNS), eight).shape == (0, OUT)


def test_modules_and_the_operator_take_the_same_path():
    plain = packed("int8-outliers", "int8-absmax")
    module = QuantizedLinear(plain)
    x = numbers(3, COLUMNS)
    x[1, 5] = 9.0
    expected = packed_linear(x, plain)
    assert torch.equal(module(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    tensors, names = packed_arguments(plain)
    assert torch.equal(packed_linear_op(x, tensors, None, *names), expected)
    torch.library.opcheck(packed_linear_op, (x.requires_grad_(), tensors, None, *names))
    assert "int8-outliers" in repr(module)


@pytest.mark.parametrize("how", ["int8", "int8-asym", "int8-outliers"])
def test_the_functions_can_be_traced_whole(how):
    weight = packed(how)
    x = numbers(3, COLUMNS)
    traced = torch.compile(lambda t: Activation8().linear(t, weight, None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(x), Activation8().linear(x, weight, None))


def test_a_kernel_for_floats_refuses_quantized_activations():
    weight, x = packed("int8"), numbers(2, COLUMNS)
    assert select(weight, x).linear(x, weight, None).shape == (2, OUT)
    assert all(
        "quantized" in str(kernel.supports(weight, x)) for kernel in KERNELS if kernel.name in ("cpu", "reference")
    )


def test_gradients_are_those_of_the_float_product():
    weight = packed("int8")
    x = numbers(3, COLUMNS).requires_grad_()
    packed_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, BITS.unpack(weight).dequantize().sum(0).expand(3, -1))
