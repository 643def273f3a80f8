"""Codebooks against a direct search of the nearest level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import whit
from whit import Codebook
from whit.capabilities import in_bytes
from whit.errors import FormatError
from whit.formats import FP4, NF4
from whit.formats.codebook import byte_levels, dynamic_levels


@pytest.mark.parametrize(
    "format", [Codebook(NF4), Codebook(FP4, 32), Codebook((-1.0, 0.0, 0.2, 0.7), 16), Codebook(dynamic_levels(), 0)]
)
def test_the_nearest_level_is_chosen(format: Codebook, random: torch.Generator):
    weight = torch.randn(7, 128, generator=random)
    q = whit.quantize_tensor(weight, format)
    absmax = q.params["absmax"].repeat_interleave(format.group_size or 128, dim=1)
    levels = torch.tensor(format.levels)
    distance = (weight[..., None] - absmax[..., None] * levels).abs()
    chosen = distance.gather(-1, q.codes.long()[..., None])[..., 0]
    assert torch.allclose(chosen, distance.min(dim=-1).values, atol=1e-6)
    assert torch.equal(q.dequantize(), levels[q.codes.long()] * absmax)


def test_tables_are_those_of_the_papers():
    assert (len(NF4), NF4[0], NF4[7], NF4[15]) == (16, -1, 0, 1)
    assert sorted(set(FP4)) == sorted({s * v / 12 for v in (0, 0.0625, 2, 3, 4, 6, 8, 12) for s in (1, -1)})
    assert len(set(dynamic_levels())) == 256


def test_double_quantization_costs_an_eighth_of_a_bit(random: torch.Generator):
    from whit.layouts import BITS

    q = whit.quantize_tensor(torch.randn(256, 512, generator=random), "nf4-dq")
    overhead = whit.bits_per_weight(BITS.pack(q)) - 4
    assert overhead == pytest.approx((8 + 32 / 256) / 64, abs=1e-3)


@pytest.mark.parametrize("spec", ["codebook(1)", "codebook(0.5,-0.5)", "codebook(a,b)", "codebook(nan,1)"])
def test_tables_that_are_none(spec: str):
    with pytest.raises(FormatError):
        whit.parse_format(spec)


def test_a_table_of_ones_own_round_trips_through_its_name():
    format = Codebook((-1.0, -0.123456789012345, 1 / 3, 1.0), 32)
    assert whit.parse_format(str(format)) == format


@pytest.mark.parametrize("levels", [NF4, FP4, "random", (-1.0, -0.29, 0.0, 0.5), (1.0, 0.9999)], ids=str)
def test_levels_in_bytes_are_the_nearest_that_a_unit_gives(levels, random: torch.Generator):
    if levels == "random":
        table = torch.rand(11, generator=random, dtype=torch.float64) * 2 - 1
        levels = tuple((table / table.abs().max()).tolist())
    integers, unit = byte_levels(levels)
    assert max(map(abs, integers)) <= 127
    given = torch.tensor(levels, dtype=torch.float64)
    error = ((torch.tensor(integers, dtype=torch.float64) * unit - given) ** 2).sum()
    units = 1 / torch.arange(1, 128, dtype=torch.float64)[:, None]
    points = torch.arange(-127, 128) * units  # of each unit all bytes
    nearest = (points[:, None] - given[:, None]).abs().min(2).values.square().sum(1)
    assert float(error) == pytest.approx(float(nearest.min()), abs=1e-12)
    finer = 1 / torch.arange(64, 127, 0.005, dtype=torch.float64)[:, None]  # no n-th: hardly better
    of_any = ((given / finer).round() * finer - given).square().sum(1)
    assert float(error) <= 1.4 * float(of_any.min()) + 1e-8


def test_in_bytes_codes_and_params_stay_what_they_are(random: torch.Generator):
    assert byte_levels((-1.0, -0.75, 0.25, 0.0)) == ((-4, -3, 1, 0), 0.25)
    for spec in ("codebook(-1,-0.75,0.25)-g32", "dynamic8"):  # exact, and no small table
        assert (format := whit.parse_format(spec)).in_bytes is format  # type: ignore[attr-defined]
    weight = torch.randn(64, 1024, generator=random)
    for spec, most in (("nf4-dq", 0.005), ("fp4-g32", 0.004), ("nf4-g64-centered", 0.005)):
        quantized = whit.quantize_tensor(weight, spec)
        rounded = replace(quantized, format=in_bytes(quantized.format))
        assert rounded.format != quantized.format
        lost = (rounded.dequantize() - quantized.dequantize()).norm() / quantized.dequantize().norm()
        assert 0.002 < float(lost) < most
    for around in ("nf4+r16", "nf4+h64"):
        assert in_bytes(whit.parse_format(around)) == whit.parse_format(around)
