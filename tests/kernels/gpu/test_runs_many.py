"""ggml's types through the fused product for more rows on Hopper, compiled for the CPU, against float64.

What this cannot see: the instructions themselves, the order of memory between engines, and speed.
benchmarks/runs_gpu.py checks the same on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from emulated_runs import many_linear, random_packed
from torch import Generator

from whit.formats.ggml.kinds import KINDS
from whit.kernels import reference
from whit.kernels.gpu import many, runs_many

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 2.5e-3, F16: 4e-4}  # a weight is rounded once, as the reference rounds it

CASES = [
    ("q4_k", BF16, 40, 1024, (2, 8, 2, 2, 1, 0, 1, 4)),
    ("q6_k", BF16, 24, 768, (1, 4, 2, 1, 1, 0, 1, 4)),
    ("iq4_xs", BF16, 40, 1024, (2, 8, 2, 3, 1, 0, 1, 4, 0, 1)),
]
MORE = [
    ("q5_k", BF16, 33, 768, (1, 4, 3, 1, 2, 0, 1, 4)),
    ("q8_0", BF16, 20, 640, (2, 4, 3, 2, 1, 0, 1, 6)),
    ("q4_0", BF16, 100, 512, (1, 4, 2, 1, 1, 0, 1, 6)),
    ("q3_k", BF16, 40, 1024, (2, 8, 2, 1, 1, 0, 2, 4)),
    ("q2_k", BF16, 24, 1024, (1, 4, 2, 1, 1, 0, 1, 4)),
    ("q4_1", BF16, 70, 512, (1, 16, 2, 1, 2, 0, 1, 2, 1)),
    ("q5_0", BF16, 17, 384, (2, 4, 3, 3, 1, 0, 1, 4, 0, 1)),
    ("q5_1", BF16, 17, 384, (1, 4, 2, 1, 1, 0, 1, 4)),
    ("iq4_nl", BF16, 140, 512, (1, 16, 2, 1, 1, 0, 1, 4)),
    ("mxfp4", BF16, 20, 512, (1, 4, 2, 1, 1, 0, 1, 4)),
    ("tq2_0", BF16, 20, 1024, (1, 4, 2, 1, 1, 0, 1, 4)),
    ("q4_k", BF16, 300, 512, (2, 32, 2, 1, 2, 0, 1, 4, 1)),
    ("q4_k", F16, 40, 1024, (2, 8, 2, 2, 1, 0, 1, 4)),
    ("q6_k", F16, 24, 768, (1, 4, 2, 1, 1, 0, 1, 4)),
    ("q8_0", F16, 20, 640, (2, 4, 3, 2, 1, 0, 1, 6)),
    ("iq4_xs", F16, 20, 512, (1, 4, 2, 1, 1, 0, 1, 4)),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("spec", "dtype", "rows", "columns", "cut"), [*CASES, *SLOW])
def test_product_of_more_rows_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, columns: int, cut: many.Cut, random: Generator
):
    packed = random_packed(spec, 200, columns, random)
    assert runs_many.why_not(packed) is None
    x, bias = torch.randn(rows, columns, generator=random).to(dtype), torch.randn(200, generator=random).to(dtype)
    exact = reference.dequantize(packed, dtype).double()
    for added in (bias, None) if rows < 50 else (bias,):
        found = many_linear(x, packed, added, cut).double()
        wanted = x.double() @ exact.T + (0 if added is None else added.double())
        assert (found - wanted).norm() < LIMIT[dtype] * wanted.norm()


@pytest.mark.parametrize("spec", ["q4_k", "q6_k"])
def test_runs_without_scales_and_very_small_ones_are_exact(spec: str, random: Generator):
    packed = random_packed(spec, 72, 512, random)
    for name in {"d", "dmin"} & packed.tensors.keys():
        packed.tensors[name][::3] = 0
        packed.tensors[name][1::3] *= 2**-9
    packed.tensors["scale"][:, ::2] = 0
    x = torch.randn(20, 512, generator=random).to(BF16)
    found, exact = many_linear(x, packed, None, (1, 4, 2)).double(), reference.dequantize(packed, BF16).double()
    wanted = x.double() @ exact.T
    assert (found - wanted).norm() < LIMIT[BF16] * wanted.norm()
    assert torch.equal(found[:, (exact == 0).all(1)], wanted[:, (exact == 0).all(1)])


@pytest.mark.parametrize("name", KINDS)
def test_what_is_dispatched_has_room(name: str):
    kind = KINDS[name]
    for outs, columns in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (512, 1024), (49152, 8192)):
        for rows in (1, 5, 8, 16, 17, 32, 64, 65, 128, 256, 512, 1024, 2048, 5000):
            cut = runs_many.best(kind, (outs, columns), rows, (9, 132))
            assert cut is not None or rows < 9 or rows > 2048
            assert cut is None or cut.fits(bool(kind.levels))
            assert cut is None or cut.split * cut.pair <= 8
    assert runs_many.best(kind, (4096, 4096), 64, (8, 108)) is None
