"""Affine formats against their two formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch

import whit
from whit import Affine
from whit.errors import FormatError, NonFiniteError


def test_the_worked_example():
    """Q(0.75) with S = 0.1 and Z = 0 is code 8, which stands for 0.8."""
    params = {"scale": torch.tensor([[0.1]])}
    codes = Affine(8).encode(torch.tensor([[0.75]]), params)
    assert codes.item() == 8
    assert Affine(8).decode(codes, params).item() == pytest.approx(0.8)


def reference(row: list[float], bits: int, scale: float, zero: float, low: int) -> list[int]:
    """clamp(round(x / S + Z)), rounding halves to even as IEEE 754 does."""
    return [min(max(round(x / scale + zero), low), low + 2**bits - 1) for x in row]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_equal_the_formula(bits: int, symmetric: bool, random: torch.Generator):
    weight = torch.randn(5, 48, generator=random, dtype=torch.float64)
    q = whit.quantize_tensor(weight, Affine(bits, 16, symmetric, scale_type="f32"))
    for r in range(5):
        for g in range(3):
            scale = q.params["scale"][r, g].double().item()
            zero = 0.5 if symmetric and bits == 1 else 0 if symmetric else q.params["zero_point"][r, g].item()
            low = 0 if not symmetric or bits == 1 else -(2 ** (bits - 1))
            columns = slice(16 * g, 16 * g + 16)
            row = weight[r, columns].tolist()
            expected_scale = (
                max(map(abs, row)) / ((2**bits - 1) / 2) if symmetric else (max(*row, 0) - min(*row, 0)) / (2**bits - 1)
            )
            if symmetric and bits > 1 and max(row) > -min(row):  # the longer side gets the step that goes further
                expected_scale = -expected_scale
            assert scale == pytest.approx(expected_scale, rel=1e-6)
            assert q.codes[r, columns].tolist() == reference(row, bits, scale, zero, low)
            decoded = [(c - zero) * scale for c in q.codes[r, columns].tolist()]
            assert q.dequantize()[r, columns].tolist() == pytest.approx(decoded, rel=1e-6)


@pytest.mark.parametrize(
    "spec", ["int8", "int4-g16", "int3-g16-asym", "int2-g16-asym-fz", "int1-g16", "nf4", "fp4", "fp8"]
)
@pytest.mark.parametrize(
    "values",
    [[0.0] * 16, [3.5] * 16, [-2.0] * 16, [1e38, -1.5e38] * 8, [1e-40, -1e-44, 0.0, 3e-39] * 4, [-0.0, 0.0] * 8, [7.0]],
    ids=["zero", "constant", "negative", "huge", "subnormal", "signed-zero", "single"],
)
def test_hard_groups_stay_finite(spec: str, values: list[float]):
    x = torch.tensor(values)
    q = whit.quantize_tensor(x, spec)
    assert torch.isfinite(q.dequantize()).all()
    if len(set(map(abs, values))) == 1 and values[0] == 0:
        assert torch.equal(q.dequantize().abs(), torch.zeros_like(x)) or spec == "int1-g16"  # one bit has no zero


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_named_with_their_position(value: float):
    x = torch.zeros(4, 8)
    x[2, 5] = value
    with pytest.raises(NonFiniteError, match=r"at position \[2, 5\]"):
        whit.quantize_tensor(x, "int4-g8")


def test_a_scale_that_its_type_cannot_hold_is_an_error():
    with pytest.raises(FormatError, match="float16"):
        whit.quantize_tensor(torch.tensor([1e9, 0.0]), "int4-channel-f16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16])
def test_any_dtype_and_shape(dtype: torch.dtype):
    x = torch.arange(-30, 30).reshape(2, 5, 6).to(dtype)
    q = whit.quantize_tensor(x, "int8-g3-asym")
    assert q.shape == (2, 5, 6)
    assert (q.dequantize() - x.float()).abs().max() < 0.2
    assert whit.error(x, q).sqnr_db > 40


def test_numpy_arrays_are_taken_and_left_alone():
    import numpy as np

    x = np.linspace(-1, 1, 32).reshape(4, 8)
    before = x.copy()
    q = whit.quantize_tensor(x, "int8-tensor")
    assert whit.error(x, q).max_abs <= 1 / 255 + 1e-6
    assert np.array_equal(x, before)


def test_a_short_last_group_is_fitted_on_its_own():
    x = torch.cat([torch.full((1, 8), 100.0), torch.tensor([[0.5, -1.0, 1.0]])], dim=1)
    q = whit.quantize_tensor(x, "int8-g8")
    assert q.params["scale"].shape == (1, 2)
    assert (q.dequantize() - x)[0, 8:].abs().max() < 0.01


def test_a_wrong_format_names_the_nearest_right_one():
    with pytest.raises(FormatError, match="did you mean int4-g128"):
        whit.parse_format("int4_g128")
    with pytest.raises(FormatError, match="9-g"):
        whit.parse_format("int9-g64")
