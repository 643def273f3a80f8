"""Tables whose rows lie in bands: each band by itself, and the rows back in their places."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from whit import quantize_tensor
from whit.errors import FormatError
from whit.formats import Bands, parse_format
from whit.formats.bands import places
from whit.kernels import dequantize, explain, packed_linear, packed_linear_op
from whit.kernels.bands import Banded, Parts
from whit.kernels.ops import packed_arguments
from whit.kernels.reference import Reference
from whit.layouts import BITS
from whit.methods import Clip
from whit.methods.bands import use_of_rows
from whit.methods.lowrank import beside
from whit.tensor import PackedWeight, QuantizedTensor, bits_per_weight

SPECS = (
    "bands(int8-g32:3,int2-g32-asym)",
    "bands(q6_k:1,nf4-dq:20,q2_k:30,iq4_xs)",
    "bands(int8-tensor:5,int4-channel)",
)
ROWS, COLUMNS = 70, 256


def table(spec: str) -> tuple[torch.Tensor, torch.Tensor, QuantizedTensor]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    use = torch.randint(0, 9, (ROWS,), generator=draw)  # with many equals
    return weight, use, beside(Clip(), use)(weight, None, parse_format(spec))


@pytest.mark.parametrize("spec", SPECS)
def test_every_row_is_what_its_own_format_makes_of_it(spec: str):
    weight, use, quantized = table(spec)
    bands = parse_format(spec)
    assert isinstance(bands, Bands)
    ranked = sorted(range(ROWS), key=lambda row: (-int(use[row]), row))  # of equals the first
    first = 0
    for format, count in bands.parts:
        rows = sorted(ranked[first : first + count] if count else ranked[first:])
        alone = quantize_tensor(weight[rows], format, Clip()).dequantize()
        assert torch.equal(quantized.dequantize()[rows], alone)
        first += len(rows)
    assert first == ROWS
    assert str(bands) == spec
    assert parse_format(str(bands)) == bands


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_rows_and_products(spec: str):
    _, _, quantized = table(spec)
    packed, exact = BITS.pack(quantized), quantized.dequantize()
    again = BITS.unpack(packed)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.dequantize(), exact)
    specs = BITS.specs(quantized.format, quantized.shape)
    assert {k: (s.shape, s.dtype) for k, s in specs.items()} == {
        k: (tuple(t.shape), t.dtype) for k, t in packed.tensors.items()
    }
    index = torch.tensor([0, 69, 5, 5, 33])
    assert torch.equal(BITS.rows(packed, index), exact[index])
    assert torch.equal(dequantize(packed), exact)
    x, bias = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1)), torch.arange(ROWS) / 8
    wanted = (x.double() @ exact.double().T + bias).float()
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        assert torch.allclose(packed_linear(x.to(dtype), packed, bias).float(), wanted, atol=near)
    tensors, said = packed_arguments(packed)
    assert torch.allclose(packed_linear_op(x, tensors, bias, *said), wanted, atol=1e-4)
    assert len([name for name, why in explain(packed, x) if why == "used"]) == 1


def test_places_against_counting():
    codes = torch.tensor([[2, 0, 1, 0, 2, 1, 0]], dtype=torch.uint8)
    below = [r for band in range(3) for r, code in enumerate(codes[0].tolist()) if code == band]
    assert places(codes).tolist() == [below.index(row) for row in range(7)]


def test_a_band_of_much_used_rows_costs_what_its_rows_cost():
    _, _, quantized = table("bands(int8-g32:7,int2-g32)")
    said = 8 * 9  # a bit a row says its band
    bits = (7 * 8.5 + 63 * 2.5) / 70 + said / (ROWS * COLUMNS)
    assert bits_per_weight(BITS.pack(quantized)) == pytest.approx(bits)


def test_use_is_how_often_a_token_occurs():
    assert use_of_rows(torch.tensor([[3, 1, 3], [0, 3, 1]]), 5).tolist() == [1, 2, 0, 3, 0]


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("bands(q2_k)", "2 to 16 formats"),
        ("bands(q5_k:4,q2_k:3)", "each but the last"),
        ("bands(q5_k,q2_k)", "each but the last"),
        ("bands(bf16:4,q2_k)", "cannot be a band"),
        ("bands(int4-g32+r4:4,q2_k)", "cannot be a band"),
        ("bands(q5_k:x,q2_k)", "not a number of rows"),
    ],
)
def test_what_cannot_be_is_said(spec: str, what: str):
    with pytest.raises(FormatError, match=what):
        parse_format(spec)


def test_without_text_nothing_says_which_rows_are_used():
    with pytest.raises(FormatError, match="which rows are used most"):
        quantize_tensor(torch.randn(8, 32), "bands(int8-g32:3,int2-g32)")
    with pytest.raises(FormatError, match="at least 9"):
        beside(Clip(), torch.arange(8))(torch.randn(8, 32), None, parse_format("bands(int8-g32:8,int2-g32)"))


@dataclass(frozen=True)
class Only(Reference):
    """A kernel for one format."""

    form: str

    def supports(self, packed: PackedWeight, x: torch.Tensor) -> str | None:
        return None if str(packed.format) == self.form else "another format"


def test_each_band_has_a_kernel_that_multiplies_it():
    packed = BITS.pack(table("bands(int8-g32:3,q6_k:9,int4-g32)")[2])
    x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(2))
    kernels = [Only(form) for form in ("int4-g32", "int8-g32", "q6_k")]
    every, few = Banded(tuple(kernels)), Banded(tuple(kernels[:2]))
    assert every.supports(packed, x) is None
    assert "a band in q6_k" in (few.supports(packed, x) or "")
    ready = every.prepare(packed)
    assert isinstance(ready, Parts)
    assert [kernel.form for kernel in ready.kernels] == ["int8-g32", "q6_k", "int4-g32"]  # type: ignore[attr-defined]
    assert every.prepare(ready) is ready
    assert all(ready.tensors[key] is tensor for key, tensor in packed.tensors.items())
    wanted = x @ dequantize(packed).T
    torch.testing.assert_close(every.linear(x, ready, None), wanted)
    torch.testing.assert_close(every.linear(x, packed, None), wanted)
