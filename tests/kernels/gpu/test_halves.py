"""Absmax in 16 bits: how far from float32, when there are none, and a product that reads them."""

from __future__ import annotations

import emulated_slab
import pytest
import torch
from torch import Generator, Tensor

import whit
from whit.kernels import reference
from whit.kernels.gpu import halves, slab, stream, tuned, ways
from whit.layouts import BITS
from whit.tensor import PackedWeight

import emulated

HALF_STEP = 2.0**-11


def told(found: dict[str, Tensor]) -> Tensor:
    return found[halves.HALVES].double() * found[halves.POWER].double()


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1.0, 3e38])
def test_halves_are_within_half_a_step_and_zeros_stay(size: float, random: Generator):
    absmax = size * torch.rand(37, 64, generator=random) + size * 1e-7 / 3
    absmax[3] = 0
    found = halves.halved(absmax)
    assert (told(found) - absmax.double()).abs().le(HALF_STEP * absmax.double()).all()
    assert (told(found)[3] == 0).all()
    assert found[halves.HALVES].isfinite().all()


def test_zeros_alone_are_zeros():
    assert (told(halves.halved(torch.zeros(3, 2))) == 0).all()


@pytest.mark.parametrize(
    "values", [[1.0, 2.0**-29], [1.0, float("inf")], [1.0, float("nan")], [2.0**-120, 2.0**-121], []]
)
def test_where_float16_would_lose_more_there_are_none(values: list[float]):
    assert halves.halved(torch.tensor([values])) == {}


def with_halves(weight: PackedWeight) -> PackedWeight:
    tensors = dict(weight.tensors) | halves.halved(weight.tensors["absmax"])
    return PackedWeight(weight.layout, weight.format, weight.shape, tensors)


def test_only_bfloat16_reads_them_and_only_where_they_are(random: Generator):
    weight = BITS.pack(whit.quantize_tensor(torch.randn(16, 256, generator=random), "nf4"))
    scheme, both = ways.scheme_of(weight), with_halves(weight)
    short = halves.read_as(both, scheme, torch.bfloat16)
    assert halves.reads_halves(short)
    assert tuned.kind(short) == tuned.kind(scheme) + "-halves"
    assert halves.read_as(both, scheme, torch.float16) == scheme
    assert halves.read_as(weight, scheme, torch.bfloat16) == scheme


def test_only_weights_that_gain_by_them_have_halves():
    nf4, shape = ways.scheme_of(BITS.pack(whit.quantize_tensor(torch.ones(16, 256), "nf4"))), (28672, 8192)
    assert tuned.reads_halves(nf4, shape, 9)
    assert not tuned.reads_halves(nf4, (4096, 4096), 9)
    assert not tuned.reads_halves(nf4, shape, 8)
    integers = ways.scheme_of(BITS.pack(whit.quantize_tensor(torch.ones(16, 256), "int4-g128")))
    assert not tuned.reads_halves(integers, shape, 9)


@pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
@pytest.mark.parametrize(("rows", "shape", "config"), [(13, (72, 512), slab.Config(64, 2, 2, 1, 1, 1))])
def test_product_with_halves_is_off_by_no_more_than_they_are(
    rows: int, shape: tuple[int, int], config: slab.Config, random: Generator
):
    weight = with_halves(BITS.pack(whit.quantize_tensor(1e-3 * torch.randn(shape, generator=random), "nf4")))
    scheme, x = stream.scheme(weight.format, shape[1]), torch.randn(rows, shape[1], generator=random).bfloat16()
    assert not isinstance(scheme, str)
    short = halves.read_as(weight, scheme, x.dtype)
    found = emulated_slab.linear(x, weight, None, short, config)
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 5e-3
    near = dict(weight.tensors) | {"absmax": told(dict(weight.tensors)).float()}
    told_so = PackedWeight(weight.layout, weight.format, weight.shape, near)
    assert torch.equal(found, emulated_slab.linear(x, told_so, None, scheme, config))  # the same but for the rounding
