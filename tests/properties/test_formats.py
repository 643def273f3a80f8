"""Properties of every format, over random matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import whit
from whit.formats import EXAMPLES, parse_format
from whit.formats.ggml import KINDS
from whit.layouts import BITS
from whit.methods import METHODS

# Of ggml's types one of each kind; the others differ by a number. What rotates is in tests/formats/test_rotated.py.
OTHER_GGML = {"q5_0", "q5_1", "q8_0", "q2_k", "q5_k", "iq4_nl", "tq2_0"}
SPECS = tuple(s for s in EXAMPLES if s != "bf16" and s not in OTHER_GGML and "+h" not in s)
DATA_FREE = [m for m in METHODS if not m.needs_stats]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 300))


@st.composite
def weights(draw) -> torch.Tensor:
    rows, columns = draw(SHAPES)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    power = draw(st.sampled_from([1.0, 3.0]))  # normal, heavy-tailed
    x = torch.randn(rows, columns, generator=g)
    return x.abs().pow(power) * x.sign() * 10.0 ** draw(st.integers(-6, 6)) + draw(st.sampled_from([0.0, 0.5]))


def suited(weight: torch.Tensor, spec: str) -> torch.Tensor:
    """Within what float16 scales reach, for ggml's types."""
    return weight.clamp(-1000, 1000) if spec in KINDS else weight


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.startswith("int") and s != "int8-absmax" and not parse_format(s).searches]
)
@given(weight=weights())
def test_affine_moves_no_value_by_more_than_half_a_step(spec: str, weight: torch.Tensor):
    format = parse_format(spec)
    params = format.fit(weight)
    error = (format.decode(format.encode(weight, params), params) - weight).abs()
    scale = torch.ones_like(weight) * params["scale"].float().abs().amax(dim=1, keepdim=True)
    tolerance = 0.6 if "-fz" in spec else 0.51  # float16 zero points of up to 255 are 1/16 apart
    assert (error <= tolerance * scale + 1e-6 * weight.abs()).all()


@pytest.mark.parametrize("spec", SPECS)
@given(weight=weights())
def test_encoding_what_was_decoded_changes_nothing(spec: str, weight: torch.Tensor):
    format, weight = parse_format(spec), suited(weight, spec)
    params = format.seal(format.fit(weight))
    if isinstance(absmax := params.get("absmax"), whit.QuantizedTensor):
        assume(absmax.dequantize().min() > 0)  # one near 0 can come back below it, and its group with other signs
    decoded = format.decode(format.encode(weight, params), params)
    assert torch.allclose(format.decode(format.encode(decoded, params), params), decoded, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@given(weight=weights())
def test_bytes_round_trip_and_are_counted(spec: str, weight: torch.Tensor):
    q = whit.quantize_tensor(suited(weight, spec), spec)
    packed = BITS.pack(q)
    back = BITS.unpack(packed)
    assert torch.equal(back.codes, q.codes)
    assert back.codes.dtype == q.codes.dtype
    assert torch.equal(back.dequantize(), q.dequantize())
    specs = BITS.specs(q.format, q.shape)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.tensors.items()} == {
        n: (s.dtype, s.shape) for n, s in specs.items()
    }
    assert whit.bits_per_weight(packed) == 8 * sum(s.nbytes for s in specs.values()) / weight.numel()
    assert parse_format(str(q.format)) == q.format


@pytest.mark.parametrize("spec", SPECS)
@given(weight=weights(), data=st.data())
def test_columns_can_be_encoded_and_decoded_piece_by_piece(spec: str, weight: torch.Tensor, data):
    format, weight = parse_format(spec), suited(weight, spec)
    params = format.seal(format.fit(weight))
    codes = format.encode(weight, params)
    first = data.draw(st.integers(0, weight.shape[1] - 1))
    last = data.draw(st.integers(first + 1, weight.shape[1]))
    assert torch.equal(format.encode(weight[:, first:last], params, first), codes[:, first:last])
    part = format.decode(codes[:, first:last], params, first)
    assert torch.equal(part, format.decode(codes, params)[:, first:last])


@pytest.mark.parametrize("spec", ["int4-g32", "int3-g64-asym", "nf4", "int2-g32", "int8"])
@given(seed=st.integers(0, 2**31))
def test_groups_do_not_know_each_other(spec: str, seed: int):
    """Permuting whole groups, or rows, permutes the result."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 256, generator=g)
    rows = torch.randperm(6, generator=g)
    assert torch.equal(
        whit.quantize_tensor(weight[rows], spec).dequantize(), whit.quantize_tensor(weight, spec).dequantize()[rows]
    )
    if size := parse_format(spec).group_size:
        columns = torch.randperm(256 // size, generator=g)
        moved = weight.reshape(6, -1, size)[:, columns].reshape(6, 256)
        expected = whit.quantize_tensor(weight, spec).dequantize().reshape(6, -1, size)[:, columns].reshape(6, 256)
        assert torch.equal(whit.quantize_tensor(moved, spec).dequantize(), expected)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("kind", ["int{}-g32", "int{}-g32-asym", "int{}-channel"])
def test_more_bits_lose_less(method, kind: str, random: torch.Generator):
    weight = torch.randn(64, 256, generator=random)
    errors = [whit.error(weight, whit.quantize_tensor(weight, kind.format(b), method())).mse for b in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("spec", SPECS)
@given(weight=weights())
def test_every_method_takes_every_format(method, spec: str, weight: torch.Tensor):
    q = whit.quantize_tensor(suited(weight, spec), spec, method())
    assert torch.isfinite(q.dequantize()).all()
    assert torch.equal(q.dequantize(), BITS.unpack(BITS.pack(q)).dequantize())
