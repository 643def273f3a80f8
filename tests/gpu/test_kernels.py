"""The GPU kernels through the public path: against float64, batch-invariant, compiled, replayed. The long list is
benchmarks/gpu_kernels.py --check."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

import whit
from whit.kernels import Gpu, dequantize, explain, packed_linear, reference
from whit.layouts import BITS
from whit.modules import QuantizedLinear
from whit.tensor import PackedWeight

pytestmark = pytest.mark.gpu


def make(spec: str, outs: int, columns: int, random: Generator) -> tuple[PackedWeight, Tensor]:
    """The weight on the GPU, and its exact floats."""
    packed = BITS.pack(whit.quantize_tensor(torch.randn(outs, columns, generator=random), spec))
    exact = BITS.unpack(packed).dequantize(torch.float64).cuda()
    there = {key: tensor.cuda() for key, tensor in packed.tensors.items()}
    return PackedWeight(packed.layout, packed.format, packed.shape, there), exact


@pytest.mark.parametrize("spec", ["int4-g128", "nf4-dq", "int8", "int3-g128-asym", "int2-g64", "int5-g20"])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_products_and_gradients_equal_float64(spec: str, rows: int, random: Generator):
    packed, exact = make(spec, 200, 1280, random)
    x = torch.randn(2, rows, 1280, generator=random).to(torch.bfloat16).cuda().requires_grad_()
    assert dict(explain(packed, x))["gpu"] == "used"
    bias = torch.randn(200, generator=random).to(torch.bfloat16).cuda()
    found = packed_linear(x, packed, bias)
    wanted = x.double() @ exact.T + bias.double()
    assert (found.double() - wanted).norm() < 4e-3 * wanted.norm()
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert (dx.double() - exact.sum(0)).norm() < 4e-3 * exact.sum(0).expand_as(x).norm()
    assert torch.equal(dequantize(packed, torch.bfloat16), reference.dequantize(packed, torch.bfloat16))


def test_a_thread_in_which_nothing_of_cuda_has_run_yet_launches_kernels(random: Generator):
    packed, _ = make("int6-g32", 64, 320, random)
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(dequantize, packed, torch.bfloat16).result()
    assert torch.equal(found, reference.dequantize(packed, torch.bfloat16))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_on_a_device_that_is_not_the_current_one(random: Generator):
    packed, exact = make("int4-g128", 256, 1024, random)
    there = replace(packed, tensors={key: tensor.to("cuda:1") for key, tensor in packed.tensors.items()})
    for rows in (1, 40, 300):
        x = torch.randn(rows, 1024, generator=random).to(torch.bfloat16).to("cuda:1")
        wanted = x.double() @ exact.to("cuda:1").T
        assert (packed_linear(x, there, None).double() - wanted).norm() < 4e-3 * wanted.norm()


@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "int8"])
def test_a_row_alone_gives_the_same_bits_as_in_any_batch(spec: str, random: Generator):
    packed, _ = make(spec, 256, 2048, random)
    x = torch.randn(130, 2048, generator=random).to(torch.bfloat16).cuda()
    whole = Gpu(invariant=True).linear(x, packed, None)
    for rows in (1, 8, 31, 64, 100):
        assert torch.equal(Gpu(invariant=True).linear(x[:rows], packed, None), whole[:rows])


@pytest.mark.parametrize("spec", ["int4-g128", "nf4-dq"])
@pytest.mark.parametrize("rows", [1, 100])
def test_a_module_compiles_whole(spec: str, rows: int, random: Generator):
    packed, exact = make(spec, 256, 512, random)
    module = QuantizedLinear(packed, dtype=torch.bfloat16)
    x = torch.randn(rows, 512, generator=random).to(torch.bfloat16).cuda()
    module(x)
    found = torch.compile(module, fullgraph=True)(x)
    wanted = x.double() @ exact.T
    assert (found.double() - wanted).norm() < 4e-3 * wanted.norm()
