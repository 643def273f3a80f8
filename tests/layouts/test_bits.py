"""The dense stream against a loop over single bits."""

from __future__ import annotations

import pytest
import torch

import whit
from whit.formats.ggml import KINDS
from whit.layouts import BITS, GGML
from whit.layouts.stream import pack_stream, unpack_stream


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 64])
def test_the_stream_is_least_significant_bit_first(bits: int, columns: int, random: torch.Generator):
    codes = torch.randint(0, 2**bits, (3, columns), generator=random, dtype=torch.uint8)
    stream = pack_stream(codes, bits, 0)
    for row, packed in zip(codes.tolist(), stream.tolist(), strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(packed) == number.to_bytes((columns * bits + 7) // 8, "little")
    assert torch.equal(unpack_stream(stream, columns, bits, 0), codes)


@pytest.mark.parametrize("spec", ["int4-g32", "int3-g32-asym", "int8", "q4_k", "mxfp4", "q8_0"])
def test_large_matrices_are_packed_in_parts(spec: str, random: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    quantized = whit.quantize_tensor(torch.randn(37, 256, generator=random), spec)
    for layout in (BITS, *([GGML] if spec in KINDS else [])):
        whole = layout.pack(quantized).tensors
        monkeypatch.setattr(f"whit.layouts.{'stream' if layout is BITS else 'ggml'}.CHUNK", 5 * 256)
        parts = layout.pack(quantized).tensors
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_codes_keep_their_extremes(bits: int):
    low = -(2 ** (bits - 1))
    codes = torch.tensor([[low, -1, 0, 1 if bits > 1 else 0, -low - 1]], dtype=torch.int8)
    stream = pack_stream(codes, bits, low)
    assert torch.equal(unpack_stream(stream, 5, bits, low), codes)


@pytest.mark.parametrize("spec", ["int4-g32", "int3-g32-asym", "nf4-dq", "int8-tensor", "fp8", "dynamic8-g32-centered"])
def test_single_rows_can_be_read(spec: str, random: torch.Generator):
    q = whit.quantize_tensor(torch.randn(40, 96, generator=random), spec)
    index = torch.tensor([39, 0, 7, 7])
    assert torch.equal(BITS.rows(BITS.pack(q), index), q.dequantize()[index])
