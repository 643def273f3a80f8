"""Refinement: what its gradients are, what it must never do, and that it does better than what it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import whit
from whit import GPTQ, RTN, Recipe, Refine
from whit.methods import method_options, parse_method
from whit.methods import refine as refine_module
from whit.methods.base import Block
from whit.methods.joined import grouped
from whit.methods.latent import Latent
from whit.tensor import LayerStats, QuantizedTensor, tensor_param

SPECS = (
    "int4-g32", "int3-g32-asym", "int2-g32", "int2-g32-asym-fz", "int1-g32", "int3-tensor", "int8-channel", "int4-g40",
    "nf4-g32", "nf4-dq", "fp4-g32", "codebook(-1,-0.3,0.2,1)-g32", "fp8", "q4_0", "q4_1",
    "mxfp4",
)  # fmt: skip


class Pair(nn.Module):
    """Two linears with a nonlinearity between, as in a block; the second is stored as (in, out)."""

    def __init__(self, random: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(96, 64, generator=random) / 8, requires_grad=False)
        self.down = nn.Parameter(torch.randn(96, 64, generator=random) / 10, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(x @ self.up.T) @ self.down


FAST = Refine(steps=60, batch=4, rate=0.02, scale_rate=0.02)


def work(random: torch.Generator, spec: str, samples: int = 8):
    """A block, its matrices, and a rounded start."""
    module, format = Pair(random), whit.parse_format(spec)
    mix = torch.randn(64, 64, generator=random) * torch.linspace(1, 0.1, 64)
    inputs = torch.randn(samples, 24, 64, generator=random) @ mix
    weights = {"up": module.up.data.clone(), "down": module.down.data.T.contiguous()}
    shaped: dict[str, Callable] = {"up": lambda m: m, "down": lambda m: m.T}
    block = Block(module, module, inputs, module(inputs), dict(module.named_parameters()), shaped)
    return block, weights, {name: RTN()(weight, None, format) for name, weight in weights.items()}


def lost(block: Block, quantized: dict[str, QuantizedTensor], mse: bool = False) -> float:
    """The loss in plain words: all samples at once, in float64."""
    up, down = (quantized[name].dequantize(torch.float64) for name in ("up", "down"))
    x, y = block.inputs.double(), block.targets.double()
    near = x + nn.functional.silu(x @ up.T) @ down.T
    error = (near - y).square().sum(-1)
    return float(error.mean() if mse else (error / y.square().sum(-1)).mean())


def refine(method: Refine, *work) -> dict[str, QuantizedTensor]:
    with torch.no_grad():
        return dict(method.refine(*work))


@pytest.mark.parametrize("spec", SPECS)
def test_every_format_gets_better(spec: str, random: torch.Generator):
    block, weights, start = work(random, spec)
    better = refine(FAST, block, weights, start)
    assert lost(block, better) < (0.98 if spec in ("fp8", "int8-channel") else 0.8) * lost(block, start)
    for name, q in better.items():
        assert q.shape == start[name].shape
        for key, spec_of in q.format.param_specs(*q.shape).items():
            param = q.params[key]
            if isinstance(param, torch.Tensor):
                assert (param.shape, param.dtype) == (spec_of.shape, spec_of.dtype)
                assert bool(torch.isfinite(param.float()).all())
    assert all(p is q for p, q in zip(block.parameters.values(), block.module.parameters(), strict=True))


@pytest.mark.parametrize("spec", [*SPECS, "q4_k", "q2_k", "q6_k"])
def test_what_is_trained_is_what_is_stored(spec: str, random: torch.Generator):
    weight = torch.randn(24, 256, generator=random)
    quantized = RTN()(weight, None, whit.parse_format(spec))
    latent = Latent(weight, quantized, 0.5, 1.0)
    for value in latent.variables.values():
        value.add_(0.4 * torch.randn(value.shape, generator=random))
    latent.confine()
    decoded, stored = latent.decode(), latent.quantized()
    assert torch.equal(decoded, stored.dequantize())
    assert not torch.equal(decoded, quantized.dequantize())
    for name in set(latent.moves) - {"zero_point", "m"}:
        assert torch.equal(tensor_param(stored.params, name) > 0, tensor_param(quantized.params, name) > 0)


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("int1")])
@pytest.mark.parametrize("inside", [0.0, 0.9])
def test_nothing_changes_before_the_first_step(spec: str, inside: float, random: torch.Generator):
    weight = torch.randn(24, 128, generator=random)
    quantized = GPTQ()(weight, LayerStats(torch.eye(128) + 0.5, 9), whit.parse_format(spec))
    assert torch.equal(Latent(weight, quantized, inside, 1.0).decode(), quantized.dequantize())


@pytest.mark.parametrize("spec", ["int4-g32", "nf4-g32", "fp4-g32", "int2-g32-asym", "codebook(-1,-0.3,0.2,1)-g32"])
def test_a_step_is_the_distance_of_neighbours(spec: str, random: torch.Generator):
    """Against all numbers that a group can be decoded to, listed and sorted."""
    weight = torch.randn(8, 64, generator=random) * torch.logspace(-2, 2, 8)[:, None]
    quantized = RTN()(weight, None, whit.parse_format(spec))
    format, codes = quantized.format, quantized.codes
    count = 4 if spec.startswith(("int2", "codebook")) else 16
    every = [
        format.decode(torch.full_like(codes, code), quantized.params)
        for code in range(format.code_min, format.code_min + count)
    ]
    numbers, _ = torch.stack(every, -1).sort(dim=-1)
    value = quantized.dequantize()[..., None]
    infinity = torch.tensor(float("inf"))
    above = torch.where(numbers > value, numbers - value, infinity).amin(-1)
    below = torch.where(numbers < value, value - numbers, infinity).amin(-1)
    both = torch.where(above.isinf(), below, torch.where(below.isinf(), above, (above + below) / 2))
    assert torch.allclose(Latent(weight, quantized, 0, 1).step, both, rtol=1e-5)


@pytest.mark.parametrize("spec", ["int4-g32", "int2-g32-asym-fz", "nf4-g32", "int3-tensor"])
def test_gradients_of_the_params_are_those_of_the_loss(spec: str, random: torch.Generator):
    """Against finite differences with the codes held; scales in float32, which rounding does not blur."""
    spec = spec + "-f32" if spec.startswith("int") and "tensor" not in spec else spec
    weight, towards = torch.randn(24, 128, generator=random), torch.randn(24, 128, generator=random)
    latent = Latent(weight, RTN()(weight, None, whit.parse_format(spec)), 0.0, 1.0)
    latent.decode()
    gradients = latent.gradients(towards)
    assert torch.equal(gradients[""], towards * latent.step)
    for name, move in latent.moves.items():
        if name == "zero_point":  # float16 is too coarse for differences
            continue
        place, values = (move.shape[0] - 1, 0), []
        for change in (1e-2, -2e-2):
            move[place] += change
            values.append(float((latent.decode().double() * towards).sum()))
        slope = (values[0] - values[1]) / 2e-2
        assert float(gradients[name][place]) == pytest.approx(slope, rel=2e-3)


class Gated(nn.Module):
    """Two matrices of one input, which a GPU moves as one."""

    def __init__(self, random: torch.Generator) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(64, 64, generator=random) / 8, requires_grad=False)
        self.up = nn.Parameter(torch.randn(64, 64, generator=random) / 8, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)


@pytest.mark.parametrize("method", [FAST, whit.Blocks(steps=20, batch=4, rate=0.03, scale_rate=0.02)])
def test_matrices_moved_as_one_go_where_each_goes(
    method: Refine, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    module, format = Gated(random), whit.parse_format("int3-g32-asym")
    inputs = torch.randn(4, 24, 64, generator=random)
    weights = {name: parameter.data.clone() for name, parameter in module.named_parameters()}
    shaped: dict[str, Callable] = {name: lambda m: m for name in weights}
    block = Block(module, module, inputs, module(inputs), dict(module.named_parameters()), shaped)
    start = {name: RTN()(weight, None, format) for name, weight in weights.items()}
    method = replace(method, steps=10)
    alone = refine(method, block, weights, start)
    as_on_a_gpu = partial(grouped, device=torch.device("cuda"))
    monkeypatch.setattr(refine_module, "grouped", lambda shapes, device: as_on_a_gpu(shapes))
    together = refine(method, block, weights, start)
    for name, value in alone.items():
        assert torch.equal(together[name].codes, value.codes)
        assert all(torch.equal(together[name].params[key], param) for key, param in value.params.items())


def test_a_group_without_steps_stays(random: torch.Generator):
    block, weights, _ = work(random, "nf4-g32")
    weights["up"][:5] = 0
    start = {name: RTN()(weight, None, whit.parse_format("nf4-g32")) for name, weight in weights.items()}
    better = refine(replace(FAST, steps=8), block, weights, start)
    assert not better["up"].dequantize()[:5].any()
    assert all(bool(torch.isfinite(q.dequantize()).all()) for q in better.values())


@pytest.mark.parametrize("loss", ["relative", "mse"])
def test_never_worse_than_the_start(loss: str, random: torch.Generator):
    block, weights, start = work(random, "int3-g32")
    wild = Refine(steps=6, batch=1, rate=3.0, scale_rate=3.0, reach=9.0, optimizer="sign", loss=loss)
    kept = refine(wild, block, weights, start)
    assert lost(block, kept, loss == "mse") <= lost(block, start, loss == "mse")
    tame = refine(replace(wild, steps=60, batch=8, rate=0.02, scale_rate=0.02), block, weights, start)
    assert lost(block, tame, loss == "mse") < 0.8 * lost(block, start, loss == "mse")


def test_asymmetric_meets_the_targets_and_symmetric_the_block_itself(random: torch.Generator):
    block, weights, start = work(random, "int3-g32")
    shifted = replace(block, targets=block.targets + 0.2 * block.inputs.roll(1, dims=1))
    towards, own = (refine(replace(FAST, asymmetric=a), shifted, weights, start) for a in (1.0, 0.0))
    assert lost(shifted, towards) < lost(shifted, own)
    assert lost(block, own) < lost(block, towards)
    exact = refine(FAST, block, weights, start)
    assert all(torch.equal(own[n].codes, exact[n].codes) for n in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_threads_and_the_seed_is_its_own(dtype: torch.dtype, random: torch.Generator):
    block, weights, start = work(random, "int4-g32-asym-fz")
    module = block.module.to(dtype)
    block = replace(block, inputs=block.inputs.to(dtype), targets=block.targets.to(dtype))
    block = replace(block, parameters=dict(module.named_parameters()))
    method, results = replace(FAST, steps=12, batch=5, inside=0.9), []
    state, before = torch.random.get_rng_state(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(refine(method, block, weights, start))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, q in results[0].items():
            assert not torch.equal(q.codes, start[name].codes)
            assert torch.equal(q.codes, other[name].codes)
            assert torch.equal(q.dequantize(), other[name].dequantize())
    assert torch.equal(torch.random.get_rng_state(), state)
    again = refine(replace(method, seed=1), block, weights, start)
    assert any(not torch.equal(again[n].codes, results[0][n].codes) for n in again)


def test_options_make_the_round_trip(tmp_path: Path):
    method = Refine(GPTQ(damp=0.05, sweeps=2), steps=7, optimizer="sign")
    assert parse_method(method_options(method)) == method
    recipe = Recipe(method, [("*", "int3-g32")])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe("refine").method == Refine()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "lion"}, "one of adam, sign"),
        ({"loss": "kl"}, "one of relative, mse"),
        ({"steps": 0}, "at least 1"),
        ({"rate": -1.0}, "rate -1.0; it must be at least 0"),
        ({"inside": 1.0}, "less than 1"),
        ({"start": {"name": "refine"}}, "another method"),
        ({"start": "gptq"}, "another method"),
        ({"start": {"name": "gptq", "dampen": 1}}, "'dampen' does not exist"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, said: str):
    with pytest.raises(whit.WhitError, match=said):
        parse_method({"name": "refine", **options})
