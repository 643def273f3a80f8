"""digits.cu compiled for the CPU, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch

import whit
from whit.formats import parse_format
from whit.kernels import dequantize
from whit.kernels.gpu import digits, stream
from whit.layouts import BITS

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
HEADERS = ("emulate", "emulate_cluster", "emulate_digits")
DRIVER = 'extern "C" void run(const Params *p, int x) { run_clusters(x, THREADS, SPLITS, [&] { digits(*p); }); }'


def multiply(x, packed, biases, cut, scheme):
    ys = [torch.full((1, weight.shape[0]), float("nan"), dtype=x.dtype) for weight in packed]
    macros = tuple(digits.macros(scheme, cut, x.dtype == torch.float16, len(packed)).items())
    argument = digits.params(x, packed, biases, ys)
    emulated.compiled(HEADERS, digits.SOURCE, DRIVER, macros).run(ctypes.byref(argument), cut.clusters * cut.splits)
    return ys


@pytest.mark.parametrize(
    ("spec", "outs", "columns", "dtype", "each", "splits"),
    [
        ("int2-g64", (100, 30), 1024, torch.bfloat16, 1, 1), ("int2-g128", (33,), 2048, torch.float16, 1, 2),
        ("int2-g64-f32", (160,), 2048, torch.bfloat16, 2, 2), ("int2-g256", (16, 1, 16), 2048, torch.bfloat16, 1, 1),
        ("int4-g128", (99,), 1024, torch.bfloat16, 1, 1), ("int4-g64", (130, 40), 1024, torch.float16, 2, 1),
        ("int3-g128", (90, 20), 1024, torch.bfloat16, 1, 1), ("int3-g128", (33,), 2048, torch.float16, 2, 1),
        ("int4-g128", (20,), 1024, torch.bfloat16, 1, 2),
        ("int2-channel", (70, 16), 1024, torch.bfloat16, 1, 2), ("int3-channel", (33,), 2048, torch.float16, 2, 1),
    ],
)  # fmt: skip
def test_one_row_is_that_of_float64(spec, outs, columns, dtype, each, splits, random):
    packed = [BITS.pack(whit.quantize_tensor(torch.randn(n, columns, generator=random), spec)) for n in outs]
    scheme = stream.scheme(parse_format(spec), columns)
    assert digits.why_not(scheme, columns) is None
    config = digits.Config(columns // 512 // each // splits, each, 2, 1)
    cut = digits.fit(scheme, config, columns, digits.tiles_of(packed), 3)
    assert (cut.splits, cut.each, cut.stages) == (splits, each, 2)
    biases = [torch.randn(outs[0], generator=random).to(dtype), *[None] * (len(outs) - 1)]
    for largest in (1, 1000):  # a warp's digits go by its largest
        x = torch.randn(1, columns, generator=random).to(dtype)
        x[0, 5] *= largest
        for found, weight, bias in zip(multiply(x, packed, biases, cut, scheme), packed, biases, strict=True):
            wanted = x.double() @ dequantize(weight, torch.float32).double().T
            wanted += 0 if bias is None else bias.double()
            error = ((found.double() - wanted).norm() / wanted.norm()).item()
            assert error < (3e-3 if dtype == torch.bfloat16 else 4e-4)
