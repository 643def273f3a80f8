"""The mathematics of training: losses and their gradients, those of scales, and matrices that are trained joined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import whit
from whit.methods.joined import Matrices, Part, can_join, join
from whit.methods.straight import Straight
from whit.qat import Course, Setting, Words, prepare_scales
from whit.qat.loop import Loop
from whit.qat.losses import divergence, hidden_loss, text_loss
from whit.qat.network import Network
from whit.qat.start import prepare_trained, starting_codes

TOKENS = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(0))

WORDS = Words(tokens=TOKENS)


def test_losses_and_their_gradients(random: torch.Generator):
    """Against autograd through torch's own."""
    logits = torch.randn(10, 50, generator=random, dtype=torch.float64).float().requires_grad_()
    teacher, targets = torch.randn(10, 50, generator=random), torch.arange(10)
    for own, plain in (
        (divergence(logits, teacher), torch.nn.functional.kl_div(
            logits.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)),
        (text_loss(logits, targets), torch.nn.functional.cross_entropy(logits, targets, reduction="sum")),
    ):  # fmt: skip
        assert torch.allclose(own.float(), plain, rtol=1e-5)
        (a,), (b,) = torch.autograd.grad(3 * own, logits), torch.autograd.grad(3 * plain, logits)
        assert torch.allclose(a, b, atol=1e-5)
    layers = [torch.randn(2, 5, 8, generator=random) for _ in range(6)]
    pairs = zip(layers[1:3], layers[4:], strict=True)
    wanted = sum(((a - b).square().sum(-1) / b.square().sum(-1)).sum() for a, b in pairs)
    assert torch.allclose(hidden_loss(layers[:3], layers[3:]).float(), wanted / 2)


def test_gradients_of_scales_are_finite_differences_of_the_loss(model: Path, tmp_path: Path):
    """With codes that stay, the loss is smooth in the scales: central differences through the whole model."""
    whit.quantize(model, tmp_path / "q", whit.Recipe("rtn", [("*", "int3-channel")]))
    training = prepare_scales(tmp_path / "q", tmp_path / "out", Course(), WORDS, Setting(teacher=model))
    job, codes = training.job, starting_codes(training)
    items = [item for item in job.plan.items if item.format is not None]
    trained = prepare_trained(training, codes)
    network = Network(job.source, job.source.read, job.device, torch.float64, [item.name for item in items])
    exact = whit.pipeline.job.open_source(model)
    loop = Loop(network, Network(exact, exact.read, job.device, torch.float64), trained, TOKENS, training.course)

    def decoded() -> dict[str, torch.Tensor]:
        return {name: value for one in trained.values() for name, value in one.decode().items()}

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad(), network.holding(decoded()) as leaves:
            return loop.gradients(TOKENS[:4], leaves, 96)

    _, found = loss()
    for name in (items[0].name, items[9].name):
        moving = trained[name]
        gradient = moving.gradients(found)["scale"]
        for row in (0, 5):
            step, ends = 0.05, []
            for sign in (1, -1):
                moving.variables["scale"][row, 0] += sign * step
                ends.append(loss()[0])
                moving.variables["scale"][row, 0] -= sign * step
            expected = float((ends[0] - ends[1]) / (2 * step))
            assert abs(float(gradient[row, 0]) - expected) < 0.01 * abs(expected) + 1e-3 * float(gradient.abs().max())


@pytest.mark.parametrize("spec", ["int2-g32", "int3-g32-asym", "ternary", "q4_0", "q4_k"])
def test_joined_matrices_are_trained_as_each_alone(spec: str, random: torch.Generator):
    """What a GPU does for speed: rows of several matrices below each other."""
    format = whit.parse_format(spec)
    weights = {name: torch.randn(rows, 256, generator=random) for name, rows in (("a", 8), ("b", 24))}
    starts = {name: whit.RTN()(weight, None, format) for name, weight in weights.items()}
    assert can_join(format, 256)
    assert not can_join(whit.parse_format("nf4-dq"), 256)
    assert not can_join(whit.parse_format("int4-tensor"), 256)

    def matrices(names: str) -> Matrices:
        parts = [Part(name, len(weights[name]), lambda m: m, lambda m: m) for name in names]
        start = join([starts[name] for name in names])
        return Matrices(parts, Straight(torch.cat([weights[name] for name in names]), start, 0.9))

    both, alone = matrices("ab"), [matrices("a"), matrices("b")]
    pull = {name: torch.randn(weight.shape, generator=random) for name, weight in weights.items()}
    for _ in range(3):
        for one in (both, *alone):
            one.decode()
            for key, gradient in one.gradients(pull).items():
                one.variables[key].sub_(gradient.sign(), alpha=0.3)
            one.confine()
    decoded, values = both.decode(), both.values()
    for one, name in zip(alone, "ab", strict=True):
        assert torch.equal(decoded[name], one.decode()[name])
        own = one.values()[name]
        assert torch.equal(values[name].codes, own.codes)
        assert torch.equal(values[name].dequantize(), decoded[name])
        assert all(torch.equal(values[name].params[key], own.params[key]) for key in own.params)
