"""The kernels of int8 activations, compiled for the CPU, against the functions that define their results.

What this cannot see: the instructions themselves, the order of memory between engines, and speed.
benchmarks/int8_gpu.py checks the same on a GPU.
"""

from __future__ import annotations

import itertools

import emulated_int8
import pytest
import torch
from torch import Generator, Tensor

from whit.kernels import float8
from whit.kernels import int8 as reference
from whit.kernels.gpu import int8, int8_row, int8_ways
from whit.kernels.gpu.int8 import Config, Weight
from whit.kernels.gpu.int8_row import OneRow
from whit.kernels.gpu.int8_thin import Thin

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16


def planted(rows: int, columns: int, dtype: torch.dtype, random: Generator, outliers: int = 0) -> Tensor:
    """Numbers below 6, but for so many columns in which some row reaches it."""
    x = torch.randn(rows, columns, generator=random).clamp(-5, 5)
    for column in torch.randperm(columns, generator=random)[:outliers]:
        x[torch.randint(rows, (1,), generator=random), column] = 6.0 + column
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 48), (7, 1072)])
def test_rows_are_the_references_bit_for_bit(rows: int, columns: int, dtype: torch.dtype, random: Generator):
    x = planted(rows, columns, dtype, random)
    x[-1, 5], x[0, 0] = -70.0, 0.3  # a row's largest is negative
    if rows > 1:
        x[1], x[2, 3], x[3, 4] = 0.0, float("nan"), float("inf")
    found, wanted = emulated_int8.quantize(x), reference.quantize_rows(x)
    finite = x.isfinite().all(1)
    assert torch.equal(found.codes[finite], wanted.codes[finite])
    assert torch.equal(found.scale[finite], wanted.scale[finite, 0])
    assert torch.equal(found.offset, 128 * found.codes.sum(1, dtype=torch.int32))
    assert not found.scale[~finite].isfinite().any()


def test_rows_as_e4m3_floats_are_the_references_bit_for_bit(random: Generator):
    x = planted(9, 1072, BF16, random) * torch.logspace(-30, 3, 9)[:, None].to(BF16)
    x[1], x[2, :300] = 0.0, x[2, :300] * 1e-3  # steps below the smallest normal number
    found, wanted = emulated_int8.quantize(x, dtype=torch.float8_e4m3fn), float8.quantize_rows(x)
    assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(found.scale, wanted.scale[:, 0])


@pytest.mark.parametrize(("rows", "outliers"), [(1, 0), (1, 3), (16, 0), (13, 7), (61, 40), (130, 21), (300, 2)])
def test_outlier_columns_are_listed_and_count_in_no_scale(rows: int, outliers: int, random: Generator):
    x = planted(rows, 1072, BF16, random, outliers)
    found, columns = emulated_int8.quantize(x, 6.0), reference.outlier_columns(x, 6.0)
    wanted = reference.quantize_rows(torch.where(columns, 0, x))
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scale, wanted.scale[:, 0])
    assert found.listed is not None
    count = int(found.listed[0])
    assert count == outliers
    assert sorted(found.listed[1 : 1 + count].tolist()) == columns.nonzero()[:, 0].tolist()


CUTS = [
    (Config(1, 64, 3, 4), 5, 70, 784),  # blocks share the columns; an uneven share
    (Config(1, 32, 2, 1), 70, 70, 144),  # ragged rows and outs, one tile after the other
    (Config(2, 32, 2), 129, 40, 272),  # outs by way of shared memory
    pytest.param(Config(2, 128, 2), 150, 168, 272, marks=pytest.mark.slow),
    pytest.param(Config(2, 256, 4), 129, 264, 144, marks=pytest.mark.slow),  # and a part at a time
    (Config(1, 64, 3, 1, 2), 140, 72, 272),  # pairs, of which one has no rows
]


def operands(rows: int, outs: int, columns: int, random: Generator, outliers: int = 0) -> tuple[Tensor, ...]:
    codes = torch.randint(0, 256, (outs, columns), dtype=torch.uint8, generator=random)
    scale = torch.rand(outs, generator=random) * 0.02 - 0.005
    return planted(rows, columns, BF16, random, outliers), codes, scale, torch.randn(outs, generator=random).to(BF16)


@pytest.mark.parametrize(("config", "rows", "outs", "columns"), CUTS)
def test_the_product_is_the_references_bit_for_bit(
    config: Config, rows: int, outs: int, columns: int, random: Generator
):
    x, codes, scale, bias = operands(rows, outs, columns, random)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    wanted = reference.int8_linear(x, signed, scale, bias, reference.quantize_rows(x))
    found = emulated_int8.multiply(emulated_int8.quantize(x), Weight(codes, scale, bias), BF16, config)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("outliers", "config", "rows", "outs", "columns"),
    [(19, *CUTS[1]), *(pytest.param(n, *CUTS[i], marks=pytest.mark.slow) for n, i in ((19, 0), (5, 2), (3, 5)))],
)
def test_however_many_outliers_there_are_none_is_dropped(
    outliers: int, config: Config, rows: int, outs: int, columns: int, random: Generator
):
    x, codes, scale, bias = operands(rows, outs, columns, random, outliers)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    wanted = reference.outlier_linear(x.float(), signed, scale[:, None], bias, 6.0)
    found = emulated_int8.multiply(emulated_int8.quantize(x, 6.0), Weight(codes, scale, bias), BF16, config).float()
    assert (found - wanted).norm() < 6e-3 * wanted.norm()  # of bfloat16, as the weight's outlier columns are


@pytest.mark.parametrize("outliers", [None, 19])
@pytest.mark.parametrize(
    ("config", "rows", "columns"),
    [
        (Thin(64, 2, 2, 2, 1), 16, 784), (Thin(64, 3, 1, 3, 0), 1, 400), (Thin(128, 2, 4, 2), 33, 1168),
        (Thin(64, 4, 2, 3, 99, 1, 2), 64, 1168),
        pytest.param(Thin(256, 3, 8, 2, 3, 1), 64, 2064, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_few_rows_beside_the_end_of_the_product_before(
    config: Thin, rows: int, columns: int, outliers: int | None, random: Generator
):
    x, codes, scale, bias = operands(rows, 168, columns, random, outliers or 0)
    signed, weight = (codes.to(torch.int16) - 128).to(torch.int8), Weight(codes, scale, bias)
    quantized = emulated_int8.quantize(x, 6.0 if outliers else 0.0)
    found = emulated_int8.multiply_thin(quantized, weight, BF16, config)
    if not outliers:
        assert torch.equal(found, reference.int8_linear(x, signed, scale, bias, reference.quantize_rows(x)))
    wanted = reference.outlier_linear(x.float(), signed, scale[:, None], bias, 6.0)
    assert (found.float() - wanted).norm() < 6e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("outliers", [None, 0, 5, 40])
@pytest.mark.parametrize(
    ("outs", "columns", "ahead"), [(70, 1088, 1), pytest.param(40, 4160, 8, marks=pytest.mark.slow)]
)
def test_one_row_in_one_launch(
    outs: int, columns: int, ahead: int, outliers: int | None, dtype: torch.dtype, random: Generator
):
    x, codes, scale, bias = operands(1, outs, columns, random, outliers or 0)
    x, bias = x.to(dtype), bias.to(dtype)
    signed, weight = (codes.to(torch.int16) - 128).to(torch.int8), Weight(codes, scale, bias)
    found = emulated_int8.multiply_row(x, weight, 0.0 if outliers is None else 6.0, OneRow(ahead), 1)
    if not outliers:
        assert torch.equal(found, reference.int8_linear(x, signed, scale, bias, reference.quantize_rows(x)))
    wanted = reference.outlier_linear(x.float(), signed, scale[:, None], bias, 6.0)
    assert (found.float() - wanted).norm() < 6e-3 * wanted.norm()


def test_rows_with_zero_points(random: Generator):
    x, codes, scale, bias = operands(9, 40, 144, random)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    known = reference.quantize_rows(x, symmetric=False)
    assert known.zero_point is not None
    offset = known.codes.sum(1, dtype=torch.int32) * 128
    rows = int8.Rows(known.codes, known.scale.contiguous(), offset, known.zero_point.contiguous())
    sums = signed.sum(1, dtype=torch.int32)
    found = emulated_int8.multiply(rows, Weight(codes, scale, bias, sums), BF16, Config(1, 32, 2))
    assert torch.equal(found, reference.int8_linear(x, signed, scale, bias, known))


@pytest.mark.parametrize("rows", [1, 16, 64, 65, 256, 1024, 4096])
@pytest.mark.parametrize(
    ("outs", "columns"), [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 14336), (4100, 4096), (16, 16)]
)
def test_every_way_fits_a_multiprocessor(rows: int, outs: int, columns: int):
    for outliers, device in itertools.product((False, True), ("NVIDIA H100 80GB HBM3", "NVIDIA H200")):
        config = int8_ways.way(outs, columns, rows, outliers, 132, device)
        if isinstance(config, OneRow):
            assert 2 * int8_row.shared_bytes(columns, outliers) <= int8.LARGEST_SHARED
        elif isinstance(config, Thin):
            assert config.fits(rows)
        else:
            assert config.shared_bytes(outliers=True, shifted=True) <= int8.LARGEST_SHARED
            assert outs % 8 == 0 or not config.through
            assert config.grid(outs, rows, 132)[0] % (config.split * config.pair) == 0
            assert config.split == 1 or config.rows * config.outs % (8 * 128 * config.groups * config.split) == 0
