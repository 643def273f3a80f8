"""Inputs of linears in training: gradients of their ranges, and that the packed model rounds as training did."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import whit
from forking import in_child
from whit.activations import parse_activations
from whit.errors import RecipeError
from whit.integrations.loading import load_causal_lm
from whit.kernels import float8, int8
from whit.qat import Course, Setting, Training, Words, learn, prepare_full, prepare_scales, train
from whit.qat.inputs import Range, round_inputs, rounded

from tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")

TOKENS = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(0))
QUICK = Course(steps=10, batch=4, rate=0.05, scale_rate=0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("inputs") / "model", "llama", torch.bfloat16)


def full(model: Path, out: Path, text: Path, format: str, how: str, course: Course = QUICK) -> Training:
    recipe = whit.Recipe("rtn", [("*", format)], activations=how)
    setting = Setting(calibration=whit.Calibration(text, samples=8, context=32))
    return prepare_full(model, out, recipe, course, Words(tokens=TOKENS), setting)


@pytest.mark.parametrize("how", ["int8-static", "int8-static-asym", "fp8-static"])
def test_gradients_are_finite_differences_where_the_rounding_is_frozen(how: str, random: torch.Generator):
    """x^ = x + r s within, r the rounding in steps; (c - z) s beyond, c the end of the range."""
    activations, x = parse_activations(how), torch.randn(40, 32, generator=random) + 0.3
    pull = torch.randn(40, 32, generator=random)
    start = {"input_scale": torch.tensor([0.011 if "int8" in how else 0.004])}
    if "asym" in how:
        start["input_zero_point"] = torch.tensor([-31], dtype=torch.int8)
    module = nn.Linear(32, 8)
    round_inputs(module, activations, start)
    leaves = [getattr(module, key).requires_grad_() for key in start]
    leaf = x.clone().requires_grad_()
    near = rounded(leaf, module, activations)
    gradients = torch.autograd.grad(near, [leaf, *leaves], pull)

    s, z = float(start["input_scale"]), float(start.get("input_zero_point", torch.zeros(1)))
    wide, out = x.double(), near.detach().double()
    if "int8" in how:
        low, high = (-128 - z) * s, (127 - z) * s
        assert torch.equal(near.detach(), (torch.clamp((x / s).round() + z, -128, 127) - z) * torch.tensor(s))
        within = (wide >= low - s / 2) & (wide <= high + s / 2)
    else:
        within = (wide / s).abs() <= 448
    assert 0.02 < float((~within).float().mean()) < 0.5  # there is something beyond

    def frozen(scale: float, zero: float) -> float:
        residue = (out - wide) / s
        code = (out / s).round() + z if "int8" in how else out / s
        value = torch.where(within, wide + residue * scale, (code - zero) * scale)
        return float((value * pull).sum())

    slope = (frozen(s + 1e-4, z) - frozen(s - 1e-4, z)) / 2e-4
    assert float(gradients[1]) == pytest.approx(slope, rel=1e-4)
    if "asym" in how:
        slope = (frozen(s, z + 0.5) - frozen(s, z - 0.5)) / 1.0
        assert float(gradients[2]) == pytest.approx(slope, rel=1e-4)
    assert torch.equal(gradients[0], torch.where(within, pull, 0.0))


def test_masters_follow_their_gradients(random: torch.Generator):
    """The chain from the stored range to what the optimizer moves, by differences."""
    start = {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([5], dtype=torch.int8)}
    one = Range("a", parse_activations("int8-static-asym"), start, torch.device("cpu"))
    one.moves["input_scale"].fill_(0.4)
    given = {"a.input_scale": torch.tensor([3.0]), "a.input_zero_point": torch.tensor([2.0])}
    found = one.gradients(given)
    values = []
    for change in (1e-2, -2e-2):
        one.moves["input_scale"].add_(change)
        values.append(3 * float(one.decode()["a.input_scale"]))
    assert float(found["input_scale"]) == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-3)
    assert float(found["input_zero_point"]) == 2 * 16
    one.moves["input_zero_point"].fill_(1000.0)
    one.confine()
    assert int(one.values()["a.input_zero_point"]) == 127


@pytest.mark.parametrize("how", ["int8-g32", "int8-tensor", "int8-asym", "fp8"])
def test_dynamic_inputs_are_rounded_as_the_packed_linear_rounds(how: str, random: torch.Generator):
    x, activations = torch.randn(6, 5, 64, generator=random), parse_activations(how)
    near = rounded(x, nn.Linear(64, 4), activations).reshape(30, 64)
    flat = x.reshape(30, 64)
    if how == "int8-g32":
        wanted = int8.rounded_groups(flat)
    elif how == "fp8":
        rows = float8.quantize_rows(flat)
        wanted = rows.codes.float() * rows.scale
    else:
        rows = int8.quantize_rows(flat, how == "int8-tensor", how != "int8-asym")
        wanted = (rows.codes.float() - (0 if rows.zero_point is None else rows.zero_point)) * rows.scale
    assert torch.allclose(near, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("format", "how"),
    [("int4-channel", "int8-static-asym"), pytest.param("int8", "int8-static", marks=pytest.mark.slow)],
)
def test_the_packed_model_has_the_ranges_that_were_trained(
    format: str, how: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    networks, losses = [], []
    training = full(model, tmp_path / "out", text, format, how, Course(steps=20, batch=8, rate=0.05, scale_rate=0.02))
    init = whit.qat.loop.Loop.__init__
    monkeypatch.setattr(
        whit.qat.loop.Loop, "__init__", lambda self, *args: (init(self, *args), networks.append(self))[0]
    )
    train(training, lambda what, step, total, loss: losses.append(loss))
    assert losses[-1] < 0.97 * losses[0]
    (loop,) = networks
    packed = load_causal_lm(str(tmp_path / "out"), dtype="float32")
    moved = 0
    for key, one in loop.trained.items():
        decoded = one.decode()
        if key.endswith(".inputs"):
            module = packed.get_submodule(key.removesuffix(".inputs"))
            for name, value in decoded.items():
                stored = module.packed.tensors[name.rpartition(".")[2]]
                assert torch.equal(stored.float(), value)
            moved += not torch.equal(one.decode()[one.names["input_scale"]], one.start["input_scale"])
        else:
            for name, value in decoded.items():
                module = packed.get_submodule(name.removesuffix(".weight"))
                assert torch.equal(module.dequantize(torch.float32), value)
    assert moved > 10
    values = {name: value for one in loop.trained.values() for name, value in one.decode().items()}
    with torch.no_grad(), loop.network.holding(values):
        logits, found = loop.network.run(TOKENS)[0], packed(TOKENS).logits
    # Sums of integers are exact where those of floats are rounded: now and then an input falls to the next code.
    assert float((found - logits).norm() / logits.norm()) < 5e-3


def test_a_killed_run_goes_on_bit_for_bit(model: Path, text: Path, tmp_path: Path):
    def run(out: Path, stop: int = 0) -> None:
        def seen(what: str, step: int, total: int, loss: float) -> None:
            if step == stop:
                signal.raise_signal(signal.SIGKILL)

        train(full(model, out, text, "int4-channel", "int8-static-asym"), seen, save_every=0.0)

    run(tmp_path / "whole" / "out")
    assert in_child(lambda: run(tmp_path / "cut" / "out", 6)) == -signal.SIGKILL
    run(tmp_path / "cut" / "out")
    files = [sorted((tmp_path / name / "out").glob("*.safetensors")) for name in ("whole", "cut")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_what_has_no_range_to_begin_with_is_refused(model: Path, text: Path, tmp_path: Path):
    whit.quantize(model, tmp_path / "q", whit.Recipe("rtn", [("*", "int4-channel")]))
    recipe = whit.Recipe("rtn", [("*", "w4a8-static")])
    training = prepare_full(model, tmp_path / "out", recipe, QUICK, Words(tokens=TOKENS), Setting(start=tmp_path / "q"))
    with pytest.raises(RecipeError, match="the start has no input_scale"):
        learn(training)
    recipe = whit.Recipe("rtn", [("*", "llm.int8")])
    training = prepare_full(model, tmp_path / "other", recipe, QUICK, Words(tokens=TOKENS))
    with pytest.raises(RecipeError, match="rounds all columns"):
        learn(training)
    whit.quantize(model, tmp_path / "w8a8", whit.Recipe("rtn", [("*", "w8a8")]))
    with pytest.raises(RecipeError, match="inputs are quantized too"):
        prepare_scales(tmp_path / "w8a8", tmp_path / "more", QUICK)
