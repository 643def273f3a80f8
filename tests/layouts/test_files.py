"""Layouts of other programs' files: bytes and back, every width, zero points 0 and max included, any codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whit.errors import CheckpointError, FormatError
from whit.export import decoders
from whit.formats import parse_format
from whit.layouts import LAYOUTS, layout_named
from whit.layouts.gptq import GPTQLayout
from whit.layouts.words import AWQ_ORDER, pack_words, reorder, unpack_padded, unpack_words
from whit.tensor import PackedWeight, QuantizedTensor

HELD = {
    "gptq": ("int2-g32-f16", "int3-g32-f16", "int4-g64-f16", "int8-channel-f16", "int4-g32-f16-act"),
    "gptq-v2": (
        "int2-g32-asym-f16", "int3-g32-asym-f16", "int4-g32-asym-f16", "int8-g32-asym-f16", "int4-g32-f16",
        "int2-g32-asym-f16-act",
    ),
    "awq": ("int4-g32-asym-f16", "int4-g64-f16", "int4-channel-asym-f16"),
    "bitsandbytes-4bit": ("nf4-g32", "fp4", "nf4-dq", "fp4-g32-dq"),
    "bitsandbytes-8bit": ("int8-absmax",),
    "pack-quantized": ("int4-g32", "int8-g32-asym", "int2-g64-asym-f32", "int4-channel", "int4-g32-asym-f16"),
    "int-quantized": ("int8", "int8-channel-bf16"),
    "float-quantized": ("fp8",),
    "mlx": ("int2-g32", "int3-g32-f16", "int4-g64", "int5-g32", "int6-g32", "int8-g64", "int4-g32-offset"),
    "matmulnbits": ("int2-g32-f32", "int4-g32", "int4-g64-asym-f32", "int2-g16-asym-f32", "int8-g64-asym"),
    "hqq": ("int1-g32-f16", "int2-g32-asym-f16", "int3-g32-asym-fz-f16", "int4-g64-f16", "int8-g32-asym-fz-f16"),
}  # fmt: skip
PAIRS = [(layout, format) for layout, formats in HELD.items() for format in formats]


def random_value(spec: str, rows: int, columns: int, seed: int) -> QuantizedTensor:
    """Any codes at all, params of a real fit, zero points anywhere from 0 to the largest."""
    format, g = parse_format(spec), torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    params = dict(format.seal(format.fit(weight)))
    codes = torch.randint(0, 1 << format.bits, (rows, columns), generator=g) + format.code_min
    if spec == "fp8":
        codes = format.encode(weight, params)
    zero = params.get("zero_point")
    if isinstance(zero, torch.Tensor) and zero.dtype == torch.uint8:
        params["zero_point"] = torch.randint(0, 1 << format.bits, zero.shape, generator=g).to(torch.uint8)
        params["zero_point"].reshape(-1)[:2] = torch.tensor([0, (1 << format.bits) - 1], dtype=torch.uint8)
    return QuantizedTensor(format, (rows, columns), codes.to(format.code_dtype), params)


def equal(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    if (
        left.format != right.format
        or not torch.equal(left.codes, right.codes)
        or left.params.keys() != right.params.keys()
    ):
        return False
    for name, param in left.params.items():
        other = right.params[name]
        if isinstance(param, QuantizedTensor) or isinstance(other, QuantizedTensor):
            assert isinstance(param, QuantizedTensor)
            assert isinstance(other, QuantizedTensor)
            if not equal(param, other):
                return False
        elif param.dtype != other.dtype or not torch.equal(param, other):
            return False
    return True


@pytest.mark.parametrize(("layout", "spec"), PAIRS)
@given(data=st.data())
def test_bytes_round_trip(layout: str, spec: str, data: st.DataObject):
    rows, columns = (32 * data.draw(st.integers(1, 3)) for _ in range(2))
    if "64" in spec or spec in ("fp4", "nf4-dq"):
        columns *= 2
    value = random_value(spec, rows, columns, data.draw(st.integers(0, 1 << 30)))
    chosen = layout_named(layout)
    assert chosen.refuses(value.format, value.shape) is None
    packed = chosen.pack(value)
    specs = chosen.specs(value.format, value.shape)
    stored = {key: t for key, t in packed.tensors.items() if key in specs}
    assert {key: (tuple(t.shape), t.dtype) for key, t in stored.items()} == {
        k: (s.shape, s.dtype) for k, s in specs.items()
    }
    assert equal(chosen.unpack(packed), value)


def test_every_layout_of_a_file_is_tested():
    assert {layout.name for layout in LAYOUTS} - {"bits", "ggml"} == HELD.keys()


def test_version_1_cannot_say_a_zero_point_of_0():
    value = random_value("int4-g32-asym-f16", 32, 32, 0)
    with pytest.raises(FormatError, match="use --export gptq-v2"):
        GPTQLayout(1).pack(value)
    ones = QuantizedTensor(
        value.format,
        value.shape,
        value.codes,
        {**value.params, "zero_point": torch.full((32, 1), 15, dtype=torch.uint8)},
    )
    assert equal(GPTQLayout(1).unpack(GPTQLayout(1).pack(ones)), ones)


def test_words_are_as_the_formats_say():
    four = random_value("int4-g32-f16", 32, 32, 0)
    assert int(GPTQLayout(1).pack(four).tensors["qzeros"][0, 0]) == 0x77777777
    assert int(GPTQLayout(2).pack(four).tensors["qzeros"][0, 0]) == 0x88888888 - (1 << 32)
    columns = torch.arange(8, dtype=torch.uint8).reshape(1, 8)
    assert int(pack_words(reorder(columns, AWQ_ORDER), 4)) == 0x75316420


@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_dense_and_padded_words(bits: int, count: int, seed: int):
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack_words(pack_words(codes, bits), count, bits), codes)
    assert (decoders.fields(pack_words(codes, bits).numpy().view("uint32"), count, bits) == codes.numpy()).all()
    each = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -count % each)).reshape(3, -1, each)
    words = (padded << (torch.arange(each) * bits)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    assert torch.equal(unpack_padded(words, count, bits), codes)


@pytest.mark.parametrize(
    ("layout", "spec", "shape", "said"),
    [
        ("gptq", "int4-g64", (32, 64), "use int4-g64-f16"),
        ("gptq", "int5-g32-f16", (32, 64), "2, 3, 4, 8 bits"),
        ("gptq", "nf4", (32, 64), "holds affine integers"),
        ("gptq", "int4-g32-f16", (33, 64), "does not do"),
        ("awq", "int8-g32-f16", (32, 64), "of 4 bits"),
        ("awq", "int4-g32-f16", (12, 64), "8 rows a word"),
        ("awq", "int4-g32-f16-act", (32, 64), "gptq and gptq-v2 hold it"),
        ("mlx", "int4-g32-act", (32, 64), "in groups of 32"),
        ("gptq", "int4-g64-f16", (32, 96), "gptq holds whole groups, and 96 columns are not a multiple of 64"),
        ("pack-quantized", "int4-g64", (32, 96), "96 columns are not a multiple of 64"),
        ("bitsandbytes-4bit", "nf4", (32, 96), "use a smaller group"),
        ("bitsandbytes-8bit", "int8", (32, 64), "use int8-absmax"),
        ("mlx", "int4-g32-asym", (32, 64), "use int4-g64"),
        ("hqq", "int4-g32", (32, 64), "float16 scales"),
        ("pack-quantized", "int3-g32", (32, 64), "2, 4, 8 bits"),
        ("matmulnbits", "int3-g32", (32, 64), "2, 4, 8 bits"),
        ("matmulnbits", "int4-g96", (32, 96), "further powers of two, and not of 96; use -g32 or -g128"),
        ("matmulnbits", "int8-channel", (32, 64), "and not whole rows"),
        ("matmulnbits", "int4-g32-act", (32, 64), "gptq and gptq-v2 hold it"),
    ],
)
def test_what_does_not_fit_is_said(layout: str, spec: str, shape: tuple[int, int], said: str):
    assert said in str(layout_named(layout).refuses(parse_format(spec), shape))


def test_zero_points_that_a_symmetric_format_does_not_have():
    value = random_value("int4-g32-asym-f16", 32, 32, 0)
    tensors = GPTQLayout(2).pack(value).tensors
    with pytest.raises(CheckpointError, match="read it as -asym"):
        GPTQLayout(2).unpack(PackedWeight("gptq-v2", parse_format("int4-g32-f16"), (32, 32), tensors))
