"""ggml's blocks against an independent decoder: gguf-py reads what whit packs, and whit what gguf-py writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import whit
from whit.errors import FormatError
from whit.formats import parse_format
from whit.formats.ggml import KINDS
from whit.layouts.ggml import GgmlBlocks
from whit.tensor import PackedWeight

gguf = pytest.importorskip("gguf", reason="gguf-py is not installed here")
LAYOUT = GgmlBlocks()
# What gguf-py itself can quantize to.
SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")


def decoded_by_gguf(data: torch.Tensor, name: str) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType(KINDS[name].number)
    return torch.from_numpy(np.array(gguf.quants.dequantize(data.numpy(), kind)))


def random_blocks(name: str, rows: int, groups: int, seed: int) -> torch.Tensor:
    """Any bytes at all, but for the float16 params, which are finite, and base-3 bytes, which hold digits."""
    g = torch.Generator().manual_seed(seed)
    format = parse_format(name)
    columns = groups * format.group_size
    codes = torch.randint(format.code_min, format.code_max + 1, (rows, columns), generator=g).to(format.code_dtype)
    params = {}
    for key, spec in format.param_specs(rows, columns).items():
        if spec.dtype == torch.float16:
            params[key] = torch.randn(spec.shape, generator=g).to(torch.float16)
        else:
            params[key] = torch.randint(0, 1 << spec.bits, spec.shape, generator=g).to(spec.dtype)
    if name == "mxfp4":
        params["exponent"].clamp_(max=254)
    return LAYOUT.pack(whit.QuantizedTensor(format, (rows, columns), codes, params)).tensors["data"]


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_ggmls(name: str):
    kind = KINDS[name]
    member = gguf.GGMLQuantizationType(kind.number)
    assert member.name.lower() == name
    assert gguf.GGML_QUANT_SIZES[member] == (kind.group_size, kind.bytes_per_group)


@pytest.mark.parametrize("name", KINDS)
@given(rows=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_gguf_py_decodes_to_whits_values_exactly(name: str, rows: int, groups: int, seed: int):
    format = parse_format(name)
    data = random_blocks(name, rows, groups, seed)
    packed = PackedWeight("ggml", format, (rows, groups * format.group_size), {"data": data})
    ours = LAYOUT.unpack(packed).dequantize()
    assert torch.equal(decoded_by_gguf(data, name), ours)
    assert torch.equal(LAYOUT.pack(LAYOUT.unpack(packed)).tensors["data"], data)


@pytest.mark.parametrize("name", KINDS)
def test_what_whit_quantizes_gguf_py_decodes(name: str, random: torch.Generator):
    weight = 0.02 * torch.randn(7, 512, generator=random)
    quantized = whit.quantize_tensor(weight, name)
    packed = LAYOUT.pack(quantized)
    assert packed.tensors["data"].shape == LAYOUT.specs(quantized.format, (7, 512))["data"].shape
    assert torch.equal(decoded_by_gguf(packed.tensors["data"], name), quantized.dequantize())
    assert whit.bits_per_weight(packed) == KINDS[name].bits_per_weight
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(LAYOUT.rows(packed, rows), quantized.dequantize()[rows])


@pytest.mark.parametrize("name", SIMPLE)
def test_bytes_of_gguf_pys_own_quantization_survive(name: str, random: torch.Generator):
    """Its codes and scales, imported and packed again, are the same bytes."""
    weight = torch.randn(16, 512, generator=random).numpy()
    data = torch.from_numpy(gguf.quants.quantize(weight, gguf.GGMLQuantizationType(KINDS[name].number)))
    unpacked = LAYOUT.unpack(PackedWeight("ggml", parse_format(name), (16, 512), {"data": data}))
    assert torch.equal(LAYOUT.pack(unpacked).tensors["data"], data)
    assert torch.equal(unpacked.dequantize(), decoded_by_gguf(data, name))


@pytest.mark.parametrize(("spec", "columns", "says"), [
    ("q4_k", 320, "whole groups of 256"), ("q4_0", 40, "whole groups of 32"), ("int4-g32", 64, "not a type of ggml"),
])  # fmt: skip
def test_what_cannot_lie_so_is_said(spec: str, columns: int, says: str):
    with pytest.raises(FormatError, match=says):
        LAYOUT.specs(parse_format(spec), (2, columns))
