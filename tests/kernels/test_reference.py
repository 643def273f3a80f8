"""The reference kernel against float64, its gradients, and how a kernel is chosen."""

from __future__ import annotations

import pytest
import torch
from random_weights import packed
from torch import Generator, Tensor

from whit.errors import KernelError
from whit.kernels import KERNELS, choice_key, explain, packed_linear, select
from whit.kernels import reference as reference_module
from whit.kernels.reference import Reference, dequantize
from whit.layouts import BITS
from whit.tensor import PackedWeight

SPECS = [
    "int8",
    "int4-g32",
    "int4-g32-asym",
    "int3-g8-asym-fz",
    "nf4-g32-dq",
    "fp8",
    "int1-g32",
    "bf16",
    "int6-tensor",
    "ternary-g32",
    "binary",
]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def exact(weight: PackedWeight) -> Tensor:
    return BITS.unpack(weight).dequantize(torch.float64)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (64, 96), (130, 257)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_reference_is_within_rounding_of_float64(
    spec: str, rows: int, columns: int, dtype: torch.dtype, random: Generator
):
    weight = packed(spec, rows, columns, random)
    bias = torch.randn(rows, generator=random).to(dtype)
    for batch in [(), (1,), (3,), (2, 5), (0,)]:
        x = torch.randn(*batch, columns, generator=random).to(dtype)
        got = packed_linear(x, weight, bias, Reference())
        assert got.dtype == dtype
        assert got.shape == (*batch, rows)
        wanted = x.double() @ exact(weight).T + bias.double()
        scale = 1 + x.double().abs() @ exact(weight).abs().T
        assert bool(((got.double() - wanted).abs() <= TOLERANCE[dtype] * scale).all())


@pytest.mark.parametrize("spec", SPECS)
def test_large_weights_are_decoded_in_chunks_with_the_same_result(spec: str, random: Generator, monkeypatch):
    weight = packed(spec, 67, 96, random)
    whole = dequantize(weight, torch.bfloat16)
    monkeypatch.setattr(reference_module, "CHUNK", 1000)
    assert torch.equal(dequantize(weight, torch.bfloat16), whole)


def test_gradients_reach_the_input_and_the_bias(random: Generator):
    weight = packed("int4-g32", 24, 64, random)
    x = torch.randn(3, 5, 64, generator=random, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(24, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: packed_linear(a, weight, b), (x, bias))
    plain = torch.nn.functional.linear(x, dequantize(weight, torch.float64), bias)
    ours = packed_linear(x, weight, bias)
    assert torch.equal(plain, ours)
    g = torch.randn(plain.shape, generator=random, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(plain, (x, bias), g), torch.autograd.grad(ours, (x, bias), g), strict=True):
        torch.testing.assert_close(a, b)


def test_the_dequantized_weight_is_not_kept_for_the_backward_pass(random: Generator):
    x = torch.randn(2, 64, generator=random, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_linear(x, packed("int8", 32, 64, random)).sum()
    assert not [t for t in kept if t.numel() >= 32 * 64]


def test_dispatch_says_what_it_uses_and_why(random: Generator):
    weight, x = packed("int8", 8, 16, random), torch.ones(2, 16)
    assert select(weight, x).supports(weight, x) is None
    reasons = dict(explain(weight, x))
    assert list(reasons) == [kernel.name for kernel in KERNELS]
    assert list(reasons.values()).count("used") == 1
    strange = PackedWeight("tiles", weight.format, weight.shape, weight.tensors)
    with pytest.raises(KernelError, match=r"tiles: no kernel runs it here .*reference: layout tiles is not known"):
        select(strange, x)
    with pytest.raises(KernelError, match="not floats"):
        select(weight, x.int())


def test_choice_key_counts_rows_by_powers_of_two():
    rows = [choice_key(torch.empty(n, 4))[2] for n in (1, 2, 3, 4, 5, 8, 9)]
    assert rows == [0, 1, 2, 2, 3, 3, 4]
    assert choice_key(torch.empty(2, 3, 4)) == choice_key(torch.empty(5, 4))
