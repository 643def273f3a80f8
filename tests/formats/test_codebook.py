"""Codebooks against a direct search of the nearest level."""

from __future__ import annotations

import pytest
import torch

import whit
from whit import Codebook
from whit.errors import FormatError
from whit.formats import FP4, NF4
from whit.formats.codebook import dynamic_levels


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
