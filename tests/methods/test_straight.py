"""Straight-through training: its gradients against finite differences, and that what is trained is what is stored."""

from __future__ import annotations

import pytest
import torch
from test_refine import lost, refine, work

import whit
from whit import RTN
from whit.formats.rotated import as_rotated
from whit.layouts import BITS
from whit.methods.latent import Latent
from whit.methods.lowrank import beside
from whit.methods.nested import Banded, Turned, moves_weights, moving_parts
from whit.methods.straight import Straight
from whit.qat.trained import Frozen
from whit.tensor import QuantizedTensor, tensor_param

SPECS = (
    "int4-g32", "int3-g32-asym", "int2-g32", "int2-g32-asym-fz", "int1-g32", "int3-tensor", "int8-channel", "int4-g40",
    "int4-g32-offset", "int8-absmax", "nf4-g32", "nf4-dq", "fp4-g32", "codebook(-1,-0.3,0.2,1)-g32", "fp8", "q4_0",
    "q4_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "tq1_0", "tq2_0", "mxfp4", "ternary", "ternary-g32", "binary-g32",
    "int3-g32-asym-act",
)  # fmt: skip


def disturbed(spec: str, random: torch.Generator, plain: bool = False) -> Straight:
    """A matrix on its way: masters and params moved from where they began."""
    weight = torch.randn(12, 256, generator=random)
    straight = Straight(weight, RTN()(weight, None, whit.parse_format(spec)), 0.5, plain)
    for key, value in straight.variables.items():
        value.add_(torch.randn(value.shape, generator=random), alpha=0.02 if plain and key else 0.4)
    straight.confine()
    return straight


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_trained_is_what_is_stored(spec: str, random: torch.Generator):
    straight = disturbed(spec, random)
    decoded, stored = straight.decode(), straight.quantized()
    assert torch.equal(decoded, stored.dequantize())
    assert not torch.equal(decoded, straight.learned.start.dequantize())
    for key, param in stored.format.param_specs(*stored.shape).items():
        value = stored.params[key]
        if isinstance(value, QuantizedTensor):
            assert value.format == param.format
        else:
            assert (value.shape, value.dtype) == (param.shape, param.dtype)
    for key in straight.learned.scales:
        assert torch.equal(tensor_param(stored.params, key) > 0, tensor_param(straight.learned.start.params, key) > 0)


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in ("int1-g32", "binary-g32")])
@pytest.mark.parametrize("inside", [0.0, 0.9])
def test_nothing_changes_before_the_first_step(spec: str, inside: float, random: torch.Generator):
    weight = torch.randn(24, 256, generator=random)
    quantized = RTN()(weight, None, whit.parse_format(spec))
    decoded = Straight(weight, quantized, inside).decode()
    # A weight in the middle between two codes (a ternary 0 has a wide cell) may fall to either side.
    assert (decoded != quantized.dequantize()).float().mean() < 0.001


@pytest.mark.parametrize("spec", ["ternary-g32", "int2-g32", "int3-g32-asym", "tq2_0"])
@pytest.mark.parametrize("inside", [0.0, 0.9])
def test_a_group_of_zeros_may_learn(spec: str, inside: float, random: torch.Generator):
    weight = torch.randn(4, 256, generator=random)
    quantized = RTN()(weight, None, whit.parse_format(spec))
    codes = quantized.codes.clone()
    codes[1, :64] = quantized.format.encode(torch.zeros_like(weight), quantized.params)[1, :64]
    zeros = QuantizedTensor(quantized.format, quantized.shape, codes, quantized.params)
    for trained in (Straight(weight, zeros, inside), Latent(weight, zeros, inside, 2.0)):
        assert torch.isfinite(trained.decode()).all()
        moved = trained.gradients(torch.ones_like(weight))
        for key, value in trained.variables.items():
            assert torch.isfinite(moved[key]).all()
            value.add_(moved[key].sign(), alpha=0.1)
        trained.confine()
        assert torch.isfinite(trained.decode()).all()


@pytest.mark.parametrize("spec", ["int3-g64+h64", "nf4-dq+h16", "bands(int8-g32:3,nf4-dq:4,int2-g32+h16)"])
def test_formats_around_others_are_trained_as_what_is_in_them(spec: str, random: torch.Generator):
    """Rotated codes, rows in bands: gradients lead to the parts through the same map that their numbers come by."""
    format, weight = whit.parse_format(spec), torch.randn(12, 256, generator=random)
    start = beside(RTN(), torch.randperm(12, generator=random))(weight, None, format)
    moving = moving_parts(lambda own, codes: Straight(own, codes, 0.9), weight, start)
    assert torch.equal(moving.decode(), start.dequantize())
    assert moving_parts(lambda _, codes: Frozen(codes), None, start).decode().equal(start.dequantize())
    pull = torch.randn(12, 256, generator=random)
    for key, gradient in moving.gradients(pull).items():
        if moves_weights(key):  # of weights within their range: (w + h) decoded is w + h, to first order
            wanted = pull if start.codes.shape[0] == 12 else pull[start.codes[0] == int(key[4])]
            turned = as_rotated(format if start.codes.shape[0] == 12 else format.parts[int(key[4])][0])
            wanted = wanted if turned is None else turned.turned(wanted)
            unit = next(u.unit for u in straights(moving) if u.master is moving.variables[key])
            inside = gradient != 0
            assert inside.float().mean() > 0.9
            torch.testing.assert_close(gradient[inside], (wanted * unit)[inside])
    for key, value in moving.variables.items():
        value.add_(torch.randn(value.shape, generator=random), alpha=0.02 if moves_weights(key) else 0.4)
    moving.confine()
    decoded, stored = moving.decode(), moving.quantized()
    assert stored.format == format
    assert torch.equal(decoded, stored.dequantize())
    assert not torch.equal(decoded, start.dequantize())
    assert torch.equal(BITS.unpack(BITS.pack(stored)).dequantize(), decoded)


def straights(moving: object) -> list[Straight]:
    if isinstance(moving, Turned):
        return straights(moving.moving)
    return [s for band in moving.bands.values() for s in straights(band)] if isinstance(moving, Banded) else [moving]


def frozen(straight: Straight, params: dict[str, torch.Tensor]) -> torch.Tensor:
    """w^ in float64 as a function of the params with the rounding frozen where `straight` stands, in plain words.

    w = s v + o: a weight within is s (v + r) + o, r its rounding; one beyond is the end of the range. Formats whose
    numbers are table or integers l times a scale, plus an offset.
    """
    w = (straight.master * straight.unit).double()
    decoded = straight.decode().double()
    used = {key: tensor_param(straight.learned.params, key).double() for key in params}
    scale, offset = affine_of(straight, used)
    new_scale, new_offset = affine_of(straight, params)
    levels = (decoded - offset) / scale
    ends = [straight.format.decode(codes, straight.learned.params) for codes in straight.learned.ends(w)]
    low, high = torch.minimum(*ends).double(), torch.maximum(*ends).double()
    residual = (decoded - w) / scale
    return torch.where((w >= low) & (w <= high), w + residual * new_scale, levels * new_scale + new_offset)


def affine_of(straight: Straight, params: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of every weight, from the definition of its kind of format."""
    wide = {
        key: value.repeat_interleave(straight.master.shape[1] // value.shape[1], 1) for key, value in params.items()
    }
    if "dmin" in wide:
        return wide["d"] * wide["scale"], -wide["dmin"] * wide["min"]
    if "zero_point" in wide:
        return wide["scale"], -wide["scale"] * wide["zero_point"]
    if "offset" in wide:
        return wide["scale"], wide["offset"]
    name = next(key for key in ("scale", "absmax", "d") if key in wide)
    return wide[name], torch.zeros_like(wide[name])


@pytest.mark.parametrize(
    "spec",
    ["int4-g32", "int2-g32", "int3-g32-asym", "int2-g32-asym-fz", "int4-g32-offset", "nf4-g32", "q4_0", "q4_k", "q2_k",
     "ternary-g32", "binary-g32"],
)  # fmt: skip
def test_gradients_of_params_are_finite_differences_with_frozen_rounding(spec: str, random: torch.Generator):
    straight = disturbed(spec, random)
    straight.decode()
    pull = torch.randn(straight.master.shape, generator=random)
    found = straight.gradients(pull)
    params = {key: tensor_param(straight.learned.params, key).double() for key in straight.learned.moves}
    for key, value in params.items():
        step = 1e-6 * value.abs().mean()
        for place in [(0, 0), (3, 1 % value.shape[1]), (11, value.shape[1] - 1)]:
            ends = []
            for sign in (1, -1):
                moved = value.clone()
                moved[place] += sign * step
                ends.append((frozen(straight, {**params, key: moved}) * pull.double()).sum())
            expected = (ends[0] - ends[1]) / (2 * step) * straight.learned.units[key][place]
            scale = (found[key].abs().mean() + expected.abs()).item()
            assert abs(found[key][place].item() - expected.item()) < 2e-3 * scale, (key, place)


def test_the_scale_of_lsq(random: torch.Generator):
    """Against the formula of Esser et al.: (q - w / s) within, the end of the range beyond; and for w 1 or 0."""
    straight = disturbed("int3-g32", random, plain=True)
    straight.decode()
    pull = torch.randn(12, 256, generator=random)
    found = straight.gradients(pull)
    s = tensor_param(straight.learned.params, "scale").float().repeat_interleave(32, 1)
    v = straight.master / s
    within = (v >= -4) & (v <= 3)
    assert 0.001 < (~within).float().mean() < 0.5
    lsq = torch.where(within, v.round() - v, v.clamp(-4, 3))
    assert torch.allclose(found["scale"], (pull * lsq).reshape(12, 8, 32).sum(-1), atol=2e-4)
    back = (v < -4) & (pull * s.sign() < 0) | (v > 3) & (pull * s.sign() > 0)
    assert torch.equal(found[""], torch.where(within | back, pull, 0.0))


@pytest.mark.parametrize(
    "spec",
    ["int2-g32", "int3-g32-asym", "nf4-dq", "q2_k", "q4_0", "ternary-g32", "binary-g32", "mxfp4", "int2-g32+h16"],
)
def test_every_format_gets_better(spec: str, random: torch.Generator):
    block, weights, start = work(random, spec)
    better = refine(whit.Blocks(steps=60, batch=4, rate=0.03, scale_rate=0.02), block, weights, start)
    assert lost(block, better) < (0.9 if spec == "q2_k" else 0.8) * lost(block, start)
