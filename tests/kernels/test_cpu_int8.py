"""Products of 8-bit activations on the processor against kernels/int8.py and float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

import whit
from whit.activations import parse_activations
from whit.capabilities import in_bytes
from whit.integrations.loading import load_causal_lm
from whit.kernels import Cpu8, dequantize, select
from whit.kernels.activated import Activation8, product_format
from whit.kernels.cpu import library
from whit.kernels.cpu.rows8 import Levels, levels_of, quantize_rows, round_groups
from whit.kernels.int8 import rounded_groups
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.pipeline import quantize
from whit.tensor import PackedWeight

from tiny_models import save_tiny

COMPILED = library()
ISAS_HERE = () if isinstance(COMPILED, str) else COMPILED.isas8
GROUPED = [
    *(f"int{bits}-g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128)), "int4-g64-asym", "int4-g96",
    "int3-g256-asym", "int2-g64-asym", "int4-channel", "int8-g32-asym", "int4-g64-asym-fz", "codebook(-1,0,1)-g32",
    "nf4", "nf4-g96", "fp4-g32", "nf4-channel", "nf4-g16", "codebook(-1,-0.31,0.113,0.77)-g32", "dynamic8",
    "codebook(-1,-0.75,-0.5,-0.25,0,0.125,0.25,0.5,1)-g32", "int8-tensor", "nf4-dq",
    "q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4", "ternary-g64", "ternary", "tq2_0",
]  # fmt: skip
TYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(isinstance(COMPILED, str), reason=f"CPU kernels: {COMPILED}")


@pytest.fixture(params=ISAS_HERE)
def kernel(request: pytest.FixtureRequest) -> Cpu8:
    return Cpu8(request.param)


def packed(spec: str, rows: int, columns: int, activations: str, random: Generator) -> PackedWeight:
    weight = BITS.pack(whit.quantize_tensor(torch.randn(rows, columns, generator=random), spec))
    return replace(weight, activations=parse_activations(activations))


@pytest.mark.parametrize("spec", GROUPED)
def test_groups_of_columns_are_products_of_rounded_activations(kernel: Cpu8, spec: str, random: Generator):
    for (rows, columns), batch in [((1, 1), 1), ((7, 33), 3), ((50, 257), 1), ((100, 640), 13)]:
        weight = packed(spec, rows, columns, "int8-g32", random)
        exact = dequantize(replace(weight, format=product_format(weight))).double()
        x = torch.randn(batch, columns, generator=random)
        assert kernel.supports(weight, x) is None
        rounded = rounded_groups(x).double()
        assert bool(((rounded - x).abs() <= x.abs().max() / 253).all())
        size = rounded.abs() @ exact.abs().T + 1e-20
        assert bool(((kernel.linear(x, weight, None).double() - rounded @ exact.T).abs() <= 3e-6 * size).all())


@pytest.mark.parametrize("how", ["int8", "int8-asym", "int8-tensor"])
def test_tokens_give_the_references_bits(kernel: Cpu8, how: str, random: Generator):
    for rows, columns in [(1, 1), (7, 33), (50, 257), (97, 640)]:
        weight = packed("int8", rows, columns, how, random)
        for dtype in TYPES:
            x = torch.randn(17, columns, generator=random).to(dtype)
            bias = torch.randn(rows, generator=random).to(dtype)
            for batch in (1, 2, 3, 4, 7, 9, 17):
                wanted = Activation8().linear(x[:batch], weight, bias)
                assert torch.equal(kernel.linear(x[:batch], weight, bias), wanted)
                assert torch.equal(kernel.linear(x[:batch], kernel.prepare(weight), bias), wanted)


@pytest.mark.parametrize("how", ["int8", "int8-asym"])
def test_nine_to_sixteen_rows_of_a_thousand_columns_give_the_references_bits(
    kernel: Cpu8, how: str, random: Generator, threads: None
):
    for columns in (1024, 1100, 4096, 4097):
        weight = packed("int8", 61, columns, how, random)
        x = torch.randn(17, columns, generator=random)
        for batch in (9, 11, 14, 16, 17):
            wanted = Activation8().linear(x[:batch], weight, None)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(kernel.linear(x[:batch], weight, None), wanted)


@pytest.mark.parametrize("spec", ["int2-channel", "int3-channel", "int4-channel", "ternary"])
def test_rows_shorter_than_a_byte_of_codes(kernel: Cpu8, spec: str, random: Generator):
    for columns in (1, 2, 3):
        weight = packed(spec, 60, columns, "int8", random)
        x, exact = torch.randn(21, columns, generator=random), dequantize(weight)
        room = x.abs().amax(1, keepdim=True) / 250 * exact.abs().sum(1)  # half a step of x for each column
        for batch in (1, 4, 21):
            found = kernel.linear(x[:batch], weight, None)
            assert bool(((found - x[:batch] @ exact.T).abs() <= room[:batch] + 1e-6).all())


@pytest.mark.parametrize("spec", ["int8", "int3-channel", "ternary"])
def test_rows_longer_than_a_panel_give_the_references_bits(kernel: Cpu8, spec: str, random: Generator):
    weight = packed(spec, 61, 2 * 4096 + 77, "int8", random)
    x = torch.randn(21, 2 * 4096 + 77, generator=random)
    for batch in (1, 4, 21):
        wanted = Activation8().linear(x[:batch], weight, None)
        if spec == "int8":
            assert torch.equal(kernel.linear(x[:batch], weight, None), wanted)
        else:
            torch.testing.assert_close(kernel.linear(x[:batch], weight, None), wanted)


@pytest.mark.parametrize("spec", ["int4-g32", "nf4", "nf4-dq"])
def test_any_number_of_rows(kernel: Cpu8, spec: str, random: Generator):
    token, group = packed("int8", 61, 288, "int8", random), packed(spec, 61, 288, "int8-g32", random)
    x = torch.randn(65, 288, generator=random)
    wanted = Activation8().linear(x, group, None)
    for rows in range(1, 66):
        assert torch.equal(kernel.linear(x[:rows], token, None), Activation8().linear(x[:rows], token, None))
        torch.testing.assert_close(kernel.linear(x[:rows], group, None), wanted[:rows], rtol=1e-5, atol=1e-4)
    assert kernel.linear(torch.ones(0, 288), token, None).shape == (0, 61)
    assert kernel.linear(torch.ones(2, 3, 288), group, None).shape == (2, 3, 61)


@pytest.mark.parametrize("how", ["int8", "int8-asym", "int8-outliers1"])
def test_narrower_weights_with_tokens(kernel: Cpu8, how: str, random: Generator):
    for spec in (*(f"int{bits}-channel" for bits in (2, 3, 4, 5, 6)), "ternary"):
        weight = packed(spec, 21, 200, how, random)
        for batch in (1, 2, 7):
            x = torch.randn(batch, 200, generator=random)
            assert kernel.supports(weight, x) is None
            torch.testing.assert_close(kernel.linear(x, weight, None), Activation8().linear(x, weight, None))


def test_static_scales_and_zero_points(kernel: Cpu8, random: Generator):
    weight, x = packed("int8", 20, 96, "int8-static-asym", random), torch.randn(5, 96, generator=random)
    given = {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([-3], dtype=torch.int8)}
    weight = replace(weight, tensors={**weight.tensors, **given})
    assert torch.equal(kernel.linear(x, weight, None), Activation8().linear(x, weight, None))


@pytest.mark.parametrize("spec", ["int8", "int8-absmax"])
def test_outlier_columns_stay_exact(kernel: Cpu8, spec: str, random: Generator):
    weight, x = packed(spec, 40, 200, "int8-outliers", random), torch.randn(6, 200, generator=random)
    x[:, [3, 77]] *= 30
    for dtype, tolerance in zip(TYPES, (1e-5, 1e-2, 2e-3), strict=True):
        bias = torch.ones(40, dtype=dtype)
        got, wanted = (k.linear(x.to(dtype), weight, bias) for k in (kernel, Activation8()))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * 40)
    calm = x.clamp(-3, 3)
    torch.testing.assert_close(kernel.linear(calm, weight, None), Activation8().linear(calm, weight, None))


def test_extreme_values_do_not_saturate(kernel: Cpu8):
    """Every product is as large as it can be: 16-bit sums of two of them would overflow."""
    weight = packed("int8", 3, 4096, "int8", torch.Generator().manual_seed(0))
    for code in (0, 255):
        tensors = {**weight.tensors, "codes": torch.full_like(weight.tensors["codes"], code)}
        extreme = replace(weight, tensors=tensors)
        for sign in (1.0, -1.0):
            x = torch.full((5, 4096), sign)
            for batch in (1, 5):
                wanted = Activation8().linear(x[:batch], extreme, None)
                assert torch.equal(kernel.linear(x[:batch], extreme, None), wanted)


@pytest.mark.parametrize(
    ("spec", "how"),
    [("int4-g64", "int8-g32"), ("nf4-dq", "int8-g32"), ("int8", "int8"), ("int3-g32-asym", "int8-g32")],
)
def test_threads_and_pointers_change_no_bit(kernel: Cpu8, spec: str, how: str, random: Generator, threads: None):
    weight, x = packed(spec, 300, 320, how, random), torch.randn(9, 320, generator=random)

    def moved(tensor: Tensor) -> Tensor:
        flat = torch.empty(tensor.numel() + 3, dtype=tensor.dtype)[3:]
        return flat.reshape(tensor.shape).copy_(tensor)

    elsewhere = replace(weight, tensors={key: moved(tensor) for key, tensor in weight.tensors.items()})
    for batch in (1, 2, 9):
        results = [kernel.linear(moved(x[:batch]), elsewhere, None)]
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(kernel.linear(x[:batch], weight, None))
        assert all(torch.equal(results[0], result) for result in results[1:])


def test_rows_that_are_not_finite_come_out_as_nan(kernel: Cpu8, random: Generator):
    for spec, how in (("int8", "int8"), ("int4-g32", "int8-g32")):
        weight, x = packed(spec, 8, 96, how, random), torch.randn(6, 96, generator=random)
        x[1, 5], x[3, 95], x[4] = torch.nan, torch.inf, 0
        y = kernel.linear(x, weight, None)
        assert [bool(row.isnan().all()) for row in y] == [False, True, False, True, False, False]
        assert bool((y[4] == 0).all())


def test_codes_are_rounded_as_the_reference_rounds(kernel: Cpu8, random: Generator):
    assert not isinstance(COMPILED, str)
    for dtype in TYPES:
        x = torch.randn(5, 77, generator=random).to(dtype)
        rows = quantize_rows(x, True, COMPILED, kernel.isa)
        floats = (rows.codes.reshape(5, -1, 32) * rows.scale[..., None]).reshape(5, -1)[:, :77]
        assert torch.equal(floats, rounded_groups(x))
        assert torch.equal(rows.sums, rows.codes.reshape(5, -1, 32).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("spec", ["dynamic8", "nf4-g16"])
def test_formats_of_other_levels_round_activations_as_the_reference_rounds(spec: str, random: Generator):
    assert not isinstance(COMPILED, str)
    weight = packed(spec, 37, 288, "int8-g32", random)
    exact = dequantize(replace(weight, format=product_format(weight))).double()
    for dtype in TYPES:
        x = torch.randn(65, 288, generator=random).to(dtype)
        x[5, 40], x[6, 287], x[7] = torch.nan, torch.inf, 0
        rounded = round_groups(x, torch.float32, COMPILED)
        torch.testing.assert_close(rounded, rounded_groups(x), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(
            round_groups(x[:, :77].contiguous(), dtype, COMPILED)[:5], rounded_groups(x[:5, :77]).to(dtype)
        )
        finite = [0, 1, 2, 3, 4, 7, *range(8, 65)]
        wanted, size = rounded[finite].double() @ exact.T, rounded[finite].double().abs() @ exact.abs().T
        for y in (
            Cpu8().linear(x, weight, None)[finite],
            torch.cat([Cpu8().linear(r, weight, None) for r in x[finite, None]]),
        ):
            assert bool(((y.double() - wanted).abs() <= 2**-8 * size + 1e-30).all())


@pytest.mark.parametrize("spec", ["int2-g64", "int3-g32-asym", "int4-g96", "codebook(-1,0,1)-g32", "nf4", "q4_k"])
def test_codes_decoded_once_for_many_rows_are_the_same(kernel: Cpu8, spec: str, random: Generator):
    weight = packed(spec, 61, 288, "int8-g32", random)
    x = torch.randn(65, 288, generator=random)
    few = torch.cat([kernel.linear(part, weight, None) for part in x.split(13)])
    torch.testing.assert_close(kernel.linear(x, weight, None), few, rtol=0, atol=0)


def test_levels_are_integers_times_a_unit():
    from whit.formats import parse_format

    assert levels_of(parse_format("int4-g32")) == Levels(None, 8, 1.0)
    assert "not multiples" in str(levels_of(parse_format("nf4")))
    assert "48" in str(levels_of(parse_format("int4-g48")))
    rounded = levels_of(in_bytes(parse_format("nf4")))
    assert isinstance(rounded, Levels)
    assert (rounded.table or b"")[::15] == bytes([0, 224])
    assert (rounded.shift, rounded.unit) == (112, pytest.approx(1 / 112))
    found = levels_of(parse_format("int8-absmax"))
    assert isinstance(found, Levels)
    assert found.shift in (127, 128)


def test_exact_columns_take_a_codebooks_own_levels(kernel: Cpu8, random: Generator):
    given = {"input_columns": torch.tensor([3, 40], dtype=torch.int32), "input_low": torch.tensor([-torch.inf])}
    weight, x = packed("nf4", 20, 96, "int8-g32-exact2", random), torch.randn(5, 96, generator=random)
    weight = replace(weight, tensors={**weight.tensors, **given})
    wanted = Activation8().linear(x, weight, None)
    torch.testing.assert_close(kernel.linear(x, weight, None), wanted, rtol=1e-5, atol=1e-4)
    alone = torch.zeros(1, 96).index_fill_(1, torch.tensor([3]), 1)  # one exact column, and nothing else
    torch.testing.assert_close(kernel.linear(alone, weight, None)[0], dequantize(weight)[:, 3])


def test_is_what_a_module_with_quantized_inputs_runs(random: Generator):
    quantized = whit.quantize_tensor(torch.randn(64, 128, generator=random), "int4-g32")
    module = QuantizedLinear.from_quantized(quantized, activations=parse_activations("int8-g32"))
    x = torch.randn(3, 128, generator=random)
    assert select(module.packed, x).name == "cpu-int8"
    exact = x @ quantized.dequantize().T
    assert 0 < (module(x) - exact).norm() < 0.01 * exact.norm()


def test_a_loaded_model_in_nf4_is_the_references(tmp_path: Path, random: Generator):
    recipe = whit.Recipe("rtn", [("*", "nf4-dq"), ("lm_head", "nf4")], activations="int8-g32")
    quantize(save_tiny(tmp_path / "model", "llama"), tmp_path / "out", recipe)
    model, ids = load_causal_lm(str(tmp_path / "out")), torch.randint(0, 90, (2, 9), generator=random)
    found: list[str] = []

    def against_the_reference(module: QuantizedLinear, args: tuple[Tensor], y: Tensor) -> None:
        found.append(select(module.packed, args[0]).name)
        wanted = Activation8().linear(args[0], module.packed, module.bias)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(against_the_reference)  # type: ignore[arg-type]
    with torch.no_grad():
        assert bool(model(input_ids=ids).logits.isfinite().all())
    assert len(found) == 15
    assert {*found} == {"cpu-int8"}


def test_what_the_kernels_cannot_read_is_said_and_not_stumbled_over():
    """Groups of columns that lie apart have params whose shape their levels cannot be asked by."""
    weight = BITS.pack(whit.quantize_tensor(torch.randn(24, 64), "int4-g32-act"))
    grouped = replace(weight, activations=parse_activations("int8-g32"))
    assert "not known" in str(Cpu8().supports(grouped, torch.randn(2, 64)))
    assert select(grouped, torch.randn(2, 64)).name == "reference-8bit"
