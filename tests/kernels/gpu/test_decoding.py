"""The kernels between a decoder's products, compiled for the CPU, against transformers' own modules."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import whit
from whit.compiled import fused
from whit.compiled.static import PlainStep, State
from whit.kernels.gpu import Gpu, attention, decoding, few, launches, nvrtc
from whit.layouts import BITS
from whit.modules import QuantizedLinear

import emulated
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here")
BF16, F16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 4e-3, F16: 1e-3}


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(("dtype", "columns", "added"), [(BF16, 4104, True), (F16, 80, False)])
def test_norm_is_that_of_transformers_and_adds_the_residual(dtype, columns, added, random):
    module = LlamaRMSNorm(columns, eps=1e-5).to(dtype)
    module.weight.data = torch.randn(columns, generator=random).to(dtype)
    residual = torch.randn(2, columns, generator=random).to(dtype)
    more = torch.randn(2, columns, generator=random).to(dtype) if added else None
    total = residual + more if added else residual.clone()
    found = decoding.norm(residual, more, module.weight.data, 1e-5, emulated.run_decoding)
    assert torch.equal(residual, total)
    assert error(found, module(total)) < 1e-4


def test_gate_is_silu_times_up_bit_for_bit(random):
    gates, ups = torch.randn(3, 344, generator=random).to(BF16), torch.randn(3, 344, generator=random).to(BF16)
    found = decoding.gate(gates, ups, emulated.run_decoding)
    assert torch.equal(found, torch.nn.functional.silu(gates) * ups)


@pytest.mark.parametrize(("dtype", "columns", "outs"), [(BF16, 4096, 37), (F16, 768, 8), (F16, 256, 1)])
def test_one_row_through_a_weight_of_floats_is_that_of_float64(dtype, columns, outs, random):
    x = torch.randn(1, columns, generator=random).to(dtype)
    weight = torch.randn(outs, columns, generator=random).to(dtype)
    found = torch.full((1, outs), float("nan"), dtype=dtype)
    decoding.dense(x, weight, found, 1, emulated.run_decoding)
    assert error(found, x.double() @ weight.double().T) < LIMIT[dtype]


def test_the_likeliest_token_is_the_first_of_equal_ones_and_padding_after_an_end(random):
    logits = torch.randn(4, 8200, generator=random).to(BF16)
    logits[0, 8199] = logits[1, 4000] = logits[1, 4001] = logits[2, 17] = logits[3, 5] = 9.0
    stops = torch.tensor([17, 3, -1, -1, -1, -1, -1, -1])
    ended, padding = torch.tensor([False, False, False, True]), torch.tensor([2])
    chosen, column, tokens = torch.zeros(4, 6, dtype=torch.int64), torch.full((4,), 3), torch.zeros(4, 1).long()
    decoding.choose(logits, (stops, padding, ended), (chosen, column, tokens), emulated.run_decoding)
    assert tokens[:, 0].tolist() == chosen[:, 3].tolist() == [8199, 4000, 17, 2]
    assert chosen.count_nonzero() == 4
    assert ended.tolist() == [False, False, True, True]
    assert column.tolist() == [4] * 4


@pytest.mark.parametrize(
    ("dtype", "group", "size", "slot", "short"),
    [
        (BF16, 4, 128, 150, None), (F16, 7, 64, 63, None), (BF16, 4, 128, 150, (8, 2)), (F16, 7, 64, 63, (8, 1)),
        (BF16, 1, 32, 191, (2, 2)), (BF16, 8, 128, 0, (1, 12)), (F16, 2, 64, 131, (4, 3)),
    ],
)  # fmt: skip
def test_attention_is_that_of_float64_over_the_cache(dtype, group, size, slot, short, random, monkeypatch):
    """Against float64 over the cache as it is afterwards; two sequences, one of them padded on the left."""
    batch, key_heads, length = 2, 2, 192
    if dtype == F16:
        monkeypatch.setattr(attention, "chunks_for", lambda texts: attention.Chunks(32, 0))

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    q, k, v = draw(batch, key_heads * group * size), draw(batch, key_heads * size), draw(batch, key_heads * size)
    keys, values = draw(batch, key_heads, length, size), draw(batch, key_heads, length, size)
    angles = torch.rand(length, size // 2, generator=random) * 6
    cosine, sine = (f(angles).repeat(1, 2).to(dtype) for f in (torch.cos, torch.sin))
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, : slot // 2] = False
    before = keys.clone()
    room = attention.Workspace.like(mask, torch.tensor([slot]), key_heads, group, size)
    room = replace(room, short=short and attention.Short(*short))
    scale, positions = size**-0.5, torch.tensor([slot, slot - slot // 2])
    rotary = cosine, sine, positions
    found = attention.attend((q, k, v), rotary, (keys, values), room, scale, emulated.run_decoding)

    wide = q.view(batch, -1, 1, size), k.view(batch, -1, 1, size)
    turned, new = apply_rotary_pos_emb(*wide, cosine[positions, None], sine[positions, None])
    before[:, :, slot] = new[:, :, 0]
    assert torch.equal(keys, before)
    assert torch.equal(values[:, :, slot], v.view(batch, -1, size))
    seen = mask & (torch.arange(length) <= slot)
    scores = turned.double().view(batch, key_heads, group, size) @ keys.double().transpose(2, 3) * scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    assert error(found, (weights @ values.double()).reshape(batch, -1)) < LIMIT[dtype]
    assert not room.arrived.any()


def test_a_step_of_packed_weights_has_norms_gates_and_sums_in_the_launches_of_its_products(monkeypatch):
    model = tiny_model("llama", dtype=BF16)
    for layer in model.model.layers:
        for part, linears in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in linears:
                weight = BITS.pack(whit.quantize_tensor(getattr(part, f"{name}_proj").weight.detach(), "int4-g32"))
                setattr(part, f"{name}_proj", QuantizedLinear(weight, None, BF16))
    count, few_launch = [], emulated.few_launch

    def launch(*given):
        count.append(given)
        return SimpleNamespace(start=lambda stream: few_launch(*given[:4], 2, *given[5:]))

    with torch.no_grad():
        state = State(model, 1, 12)
        wanted = fused.trial(model, state, PlainStep(model))
        step = fused.FusedStep(model, emulated.run_decoding)
        monkeypatch.setattr(QuantizedLinear, "ready", lambda linear, x: (Gpu(), linear.packed))
        monkeypatch.setattr(launches, "_device_of", lambda device: (9, 132))
        monkeypatch.setattr(few, "launch", launch)
        monkeypatch.setattr(nvrtc, "stream_on", lambda device: 0)
        monkeypatch.setattr(model, "forward", lambda **_: None)  # the prompt of the trial is in the cache already
        found = fused.trial(model, state, step)
    assert len(count) == 4 * len(model.model.layers)
    assert error(found, wanted) < 2e-2


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3")]


@pytest.mark.parametrize("architecture", ["llama", *SLOWER])
def test_a_fused_step_gives_the_logits_of_the_models_own(architecture, random):
    model = tiny_model(architecture, dtype=BF16)
    assert fused.why_not(model) is None
    with torch.no_grad():
        state = State(model, 2, 12)
        step = fused.best_step(model, state, emulated.run_decoding)
        assert isinstance(step, fused.FusedStep)
        wanted, found = (fused.trial(model, state, each) for each in (PlainStep(model), step))
        assert error(found, wanted) < 2e-2
        layer = model.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_: None)
    assert "hooks" in str(fused.why_not(model))
