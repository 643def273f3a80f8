"""k-quants, ternary and binary: the CUDA sources compiled for the CPU, against float64 and against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated_runs import random_packed
from torch import Generator, Tensor

import whit
from whit.formats import parse_format
from whit.kernels import reference
from whit.kernels.gpu import runs, runs_row
from whit.kernels.gpu.runs import Config, Scheme
from whit.layouts import BITS
from whit.tensor import PackedWeight

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16


def scheme_of(packed: PackedWeight) -> Scheme:
    found = runs.scheme(packed.format, packed.shape[1])
    assert not isinstance(found, str), found
    assert runs.unaligned(packed, found) is None
    return found


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, config: Config) -> Tensor:
    found, y = scheme_of(packed), torch.full((len(x), packed.shape[0]), float("nan"), dtype=x.dtype)
    macros = runs.few_macros(found, config, x.dtype == F16, len(x))
    params = runs.few_params(x, packed, bias, y, found)
    library = emulated.library(runs.FEW, tuple(macros.items()))
    library.run(ctypes.byref(params), -(-packed.shape[0] // 16), 1, 1)
    return y


FEW = [("q4_k", BF16, 1, 512, Config(2, 2, 1)), ("ternary-g64", F16, 9, 320, Config(2, 1, 1))]
MORE = [
    ("q6_k", F16, 5, 512, Config(4, 1, 1)), ("q3_k", BF16, 27, 256, Config(2, 1, 1)),
    ("iq4_xs", F16, 9, 256, Config(1, 2, 1)),
    ("q2_k", BF16, 2, 768, Config(2, 3, 1)), ("q5_k", F16, 1, 512, Config(2, 1, 1)),
    ("binary", BF16, 7, 96, Config(1, 1, 1)), ("q4_1", F16, 4, 288, Config(2, 2, 1)),
    ("mxfp4", BF16, 1, 64, Config(2, 1, 1)), ("ternary", F16, 12, 160, Config(2, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "dtype", "rows", "columns", "config"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_product_of_few_rows_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, columns: int, config: Config, random: Generator
):
    packed = random_packed(spec, 37, columns, random)
    x, bias = torch.randn(rows, columns, generator=random).to(dtype), torch.randn(37, generator=random).to(dtype)
    exact = reference.dequantize(packed, dtype).double()  # what is multiplied are the reference's own weights
    for added in (bias, None):
        found = linear(x, packed, added, config)
        wanted = x.double() @ exact.T + (0 if added is None else added.double())
        assert (found.double() - wanted).norm() < {BF16: 2.5e-3, F16: 4e-4}[dtype] * wanted.norm()


DECODED = ["q3_k", "q4_k", "iq4_xs", "ternary-g32", "binary"]
MORE_DECODED = [
    "q2_k", "q5_k", "q6_k", "q4_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "tq2_0", "ternary-tensor-absmean",
    "ternary-g64-f32", "binary-g64",
]  # fmt: skip


@pytest.mark.parametrize("spec", [*DECODED, *(pytest.param(spec, marks=pytest.mark.slow) for spec in MORE_DECODED)])
def test_dequantizing_equals_the_reference_bit_for_bit(spec: str, random: Generator):
    for (outs, columns), dtype in (((5, 512), BF16), ((3, 256), F16)):
        packed = random_packed(spec, outs, columns, random)
        found = torch.full((outs, columns), float("nan"), dtype=dtype)
        params = runs.DequantizeParams(runs.weight_params(packed, scheme_of(packed)), found.data_ptr())
        macros = scheme_of(packed).macros | {"HALF": int(dtype == F16)}
        emulated.library(runs.DEQUANTIZE, tuple(macros.items())).run(ctypes.byref(params), 2, 1, 1)
        assert torch.equal(found, reference.dequantize(packed, dtype))


@pytest.mark.parametrize(
    ("spec", "columns", "reason"),
    [("int4-g32", 512, "runs"), ("q4_0", 48, "multiple of 32"), ("ternary-g48", 96, "neither 16")],
)
def test_it_says_what_it_cannot_run(spec: str, columns: int, reason: str):
    found = runs.scheme(whit.parse_format(spec), columns)
    assert isinstance(found, str)
    assert reason in found


ROW = [("q4_k", BF16, 1, 512, runs_row.Config(2, 2)), ("q6_k", BF16, 2, 768, runs_row.Config(2, 1))]
MORE_ROW = [
    ("iq4_xs", F16, 1, 512, runs_row.Config(2, 1)), ("q8_0", BF16, 3, 288, runs_row.Config(2, 1)),
    ("q5_k", BF16, 8, 512, runs_row.Config(2, 2)), ("q3_k", F16, 4, 512, runs_row.Config(1, 2)),
    ("q2_k", BF16, 1, 512, runs_row.Config(1, 2)), ("q4_0", BF16, 7, 160, runs_row.Config(2, 2)),
    ("q5_1", BF16, 1, 160, runs_row.Config(2, 2)), ("mxfp4", BF16, 1, 160, runs_row.Config(2, 2)),
    ("q4_1", F16, 1, 160, runs_row.Config(1, 2)), ("iq4_nl", BF16, 5, 96, runs_row.Config(1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "dtype", "rows", "columns", "config"),
    [*ROW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_ROW)],
)
def test_product_of_a_few_rows_with_scales_applied_to_sums_equals_float64(
    spec: str, dtype: torch.dtype, rows: int, columns: int, config: runs_row.Config, random: Generator
):
    packed = random_packed(spec, 69, columns, random)  # five tiles for two blocks, the last not whole
    assert runs_row.why_not(packed) is None
    x, bias = torch.randn(rows, columns, generator=random).to(dtype), torch.randn(69, generator=random).to(dtype)
    exact = reference.dequantize(packed, torch.float32).double()
    library = emulated.library(runs_row.SOURCE, tuple(runs_row.macros(packed, config, dtype == F16, rows).items()))
    for added in (bias, None):
        y = torch.full((rows, 69), float("nan"), dtype=dtype)
        library.run(ctypes.byref(runs_row.params(x, packed, added, y)), 2, 1, 1)
        wanted = x.double() @ exact.T + (0 if added is None else added.double())
        assert (y.double() - wanted).norm() < {BF16: 2.5e-3, F16: 4e-4}[dtype] * wanted.norm()


@pytest.mark.parametrize(("spec", "shape"), [("q4_k", (14336, 4096)), ("q6_k", (4096, 14336)), ("q8_0", (4096, 4096))])
def test_what_is_dispatched_has_room(spec: str, shape: tuple[int, int]):
    specs = BITS.specs(parse_format(spec), shape)
    tensors = {name: torch.empty(want.shape, dtype=want.dtype, device="meta") for name, want in specs.items()}
    packed = PackedWeight(BITS.name, parse_format(spec), shape, tensors)
    assert runs_row.best(packed, 1) is not None
    for rows in range(1, 17):
        cut = runs_row.best(packed, rows)
        assert cut is None or cut.blocks * runs_row.shared_bytes(packed, cut, rows) <= runs_row.MOST_SHARED
    assert runs_row.best(packed, 5) is None
