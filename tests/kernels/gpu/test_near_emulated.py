"""The fused product that keeps x in registers, compiled for the CPU, against float64.

What this cannot see: the instructions themselves, the order of memory between engines, and speed.
benchmarks/gpu_near.py checks the same on a GPU.
"""

from __future__ import annotations

import emulated_near
import pytest
import torch
from torch import Generator

import whit
from whit.kernels import reference
from whit.kernels.gpu import near, stream
from whit.kernels.gpu.near import Config
from whit.layouts import BITS

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 5e-3, F16: 1e-3}

CASES = [
    ("int4-g128", BF16, 13, Config(3, 2)),
    ("nf4", BF16, 6, Config(4, 3)),
]
MORE = [
    ("int4-g128", F16, 8, Config(4, 2)),
    ("nf4", BF16, 16, Config(3, 1)),
    ("nf4-dq", BF16, 1, Config(3, 3)),
    ("fp4-g32", BF16, 5, Config(3, 3)),
    ("int4-g64-f16", F16, 2, Config(5, 2)),
    ("int4-g32-f32", BF16, 16, Config(4, 2)),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("spec", "dtype", "rows", "config"), [*CASES, *SLOW])
def test_product_with_x_in_registers_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, config: Config, random: Generator
):
    outs, columns = 200, 768
    weight = BITS.pack(whit.quantize_tensor(torch.randn(outs, columns, generator=random), spec))
    scheme = stream.scheme(weight.format, columns)
    assert not isinstance(scheme, str)
    assert near.why_not(scheme, columns, config) is None
    x, bias = torch.randn(rows, columns, generator=random).to(dtype), torch.randn(outs, generator=random).to(dtype)
    found = emulated_near.linear(x, weight, bias, scheme, config)
    wanted = x.double() @ reference.dequantize(weight, torch.float32).double().T + bias.double()
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < LIMIT[dtype]
