"""torchao's optimizers, where torchao is installed: a run that was saved and loaded goes on with the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whit.errors import TrainingError
from whit.training.optimizers import make_optimizer, set_rate
from whit.training.state import load_state, save_state


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        set_rate(optimizer, 0.01 / (1 + number))
        optimizer.step()


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 16, bias=False), nn.Linear(16, 8))
    return model, make_optimizer(name, list(model.parameters()), 0.01, 0.0)


@pytest.mark.parametrize("name", ["torchao-adamw-8bit", "torchao-adamw-4bit"])
def test_resumed_steps_are_the_same_bits(name):
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        whole, optimizer = made(name)
        steps(whole, optimizer, 0, 4)
        first, optimizer = made(name)
        steps(first, optimizer, 0, 2)
        saved = save_state(first, optimizer, 2)
        second, optimizer = made(name)
        assert load_state(saved, second, optimizer) == 2
        steps(second, optimizer, 2, 4)
        plain, optimizer = made("adamw")
        steps(plain, optimizer, 0, 4)
    for one, other, exact in zip(whole.parameters(), second.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
        assert float((one - exact).detach().norm() / exact.detach().norm()) < 0.05


def test_without_torchao_another_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(TrainingError, match=r"torchao cannot be imported .* use --optimizer adamw-8bit"):
        made("torchao-adamw-8bit")
