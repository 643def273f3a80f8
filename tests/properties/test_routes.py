"""Round trips between all kinds of file that claim to be lossless: any codes, zero points 0 and max included.

A value lies in one kind of file, is read, carried over to another kind in the first variant of its format that this
holds, and read again: the numbers are the same bit for bit, and so they are when they have gone back.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.errors import FormatError
from whit.formats import parse_format
from whit.layouts import GGML, LAYOUTS, Layout
from whit.pipeline.transcode import recast, variants
from whit.tensor import Format, QuantizedTensor

# Formats whose numbers more than one kind of file holds.
SPECS = (
    "int2-g32-f16", "int3-g32-f16", "int4-g32-f16", "int4-g64-f16", "int8-g32-f16", "int8-g64", "int5-g32-f16",
    "int4-channel-f16", "int8-channel-f32", "int4-g32-asym-f16", "int2-g32-asym-f16", "int3-g64-asym-f16",
    "int8-g32-asym-f16", "int4-channel-asym-f16", "q4_0", "q5_0", "q8_0", "int4-g32-f16-act", "int3-g32-asym-f16-act",
    "int4-g64-offset-f16", "nf4", "nf4-dq", "fp8", "int8-absmax",
)  # fmt: skip


def any_value(spec: str, rows: int, columns: int, seed: int) -> QuantizedTensor:
    """Codes, zero points and groups anywhere in their range; scales that float16 and bfloat16 both hold."""
    format, g = parse_format(spec), torch.Generator().manual_seed(seed)
    params = dict(format.seal(format.fit(torch.randn(rows, columns, generator=g))))
    for name in ("scale", "d", "offset"):
        if isinstance(param := params.get(name), torch.Tensor):
            params[name] = (torch.randint(64, 128, param.shape, generator=g) / 4096).to(param.dtype)
    codes = torch.randint(0, 1 << format.bits, (rows, columns), generator=g) + format.code_min
    if spec == "fp8":
        codes = format.encode(torch.randn(rows, columns, generator=g), params)
    if isinstance(zero := params.get("zero_point"), torch.Tensor):
        params["zero_point"] = torch.randint(0, 1 << format.bits, zero.shape, generator=g).to(torch.uint8)
        params["zero_point"].reshape(-1)[:2] = torch.tensor([0, (1 << format.bits) - 1])
    if isinstance(group := params.get("group"), torch.Tensor):
        params["group"] = group[:, torch.randperm(columns, generator=g)]
    return QuantizedTensor(format, (rows, columns), codes.to(format.code_dtype), params)


def held(layout: Layout, format: Format, shape: tuple[int, int]) -> Format | None:
    """The first variant that the layout holds."""
    return next((f for f in variants(format) if layout.refuses(f, shape) is None), None)


def carried(value: QuantizedTensor, layout: Layout) -> QuantizedTensor | None:
    """What is read from a file of that kind; None where it holds no such numbers, or says so."""
    format = held(layout, value.format, value.shape)  # type: ignore[arg-type]
    if format is None:
        return None
    try:
        return layout.unpack(layout.pack(recast(value, format, "here")))
    except FormatError as error:
        assert "a zero point is 0, which version 1 of the format cannot say" in str(error)  # noqa: PT017
        return None


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=8)
@given(data=st.data())
def test_all_pairs_give_the_same_numbers(spec: str, data: st.DataObject):
    rows, columns = 32 * data.draw(st.integers(1, 2)), 64 * data.draw(st.integers(1, 3))
    value = any_value(spec, rows, columns, data.draw(st.integers(0, 1 << 30)))
    numbers = value.dequantize()
    first = {layout.name: found for layout in LAYOUTS if (found := carried(value, layout)) is not None}
    assert len(first) >= (1 if spec.endswith("asym-f16") and "int3" in spec else 2)
    for name, there in first.items():
        assert torch.equal(there.dequantize(), numbers), name
        for layout in LAYOUTS:
            again = carried(there, layout)
            assert again is None or torch.equal(again.dequantize(), numbers), (name, layout.name)


def test_the_pairs_are_those_that_are_promised():
    """Symmetric GPTQ, compressed-tensors and MLX; AWQ; Q4_0 and Q8_0: each from each."""
    shape = (64, 128)
    four = {layout.name for layout in LAYOUTS if held(layout, parse_format("int4-g32-f16"), shape)}
    assert four >= {"bits", "ggml", "gptq", "gptq-v2", "awq", "pack-quantized", "mlx", "hqq", "matmulnbits"}
    assert str(held(GGML, parse_format("int4-g64-f16"), shape)) == "q4_0"
    assert str(held(GGML, parse_format("int8-g64"), shape)) == "q8_0"
    ordered = {layout.name for layout in LAYOUTS if held(layout, parse_format("int4-g32-f16-act"), shape)}
    assert ordered == {"bits", "gptq", "gptq-v2"}


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.name != "bits"], ids=lambda layout: layout.name
)
@pytest.mark.parametrize("spec", ["int4-g64-f16", "int4-g64-asym-f16", "int4-g64-f16-act", "int8-g64", "q4_0", "nf4"])
def test_ragged_last_groups_are_refused(layout: Layout, spec: str):
    """80 columns in groups of 64, of 32, or of 64 in a flat stream."""
    reason = layout.refuses(parse_format(spec), (33 if spec == "nf4" else 32, 80))
    assert reason is not None
    assert "\n" not in reason
