"""torchao's optimizers, where torchao is installed: a run that was saved and loaded goes on with the same bits; and
what takes the place of an optimizer that does not run."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from torch import nn

from whit.errors import TrainingError
from whit.training.optimizers import make_optimizer, set_rate, settle_optimizer
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
        settle_optimizer("torchao-adamw-8bit", torch.device("cpu"))


PLACES = [
    ("adamw", ("torchao", "bitsandbytes"), "adamw", None),
    ("paged-adamw", (), "adamw", "pages between a GPU and the CPU, and the model is on the CPU; adamw takes its place"),
    (
        "adamw-8bit",
        ("torchao", "bitsandbytes"),
        "adamw",
        r"bitsandbytes cannot be imported .*; adamw takes",
    ),
    ("adamw-8bit", ("bitsandbytes",), "torchao-adamw-8bit", "torchao-adamw-8bit takes its place"),
    ("paged-adamw-8bit", ("bitsandbytes",), "torchao-adamw-8bit", r"pages .*; bitsandbytes cannot .*; torchao-adamw"),
]


@pytest.mark.parametrize(("asked", "absent", "runs", "said"), PLACES)
def test_what_does_not_run_gives_way_and_it_is_said(monkeypatch, asked, absent, runs, said):
    for library in ("bitsandbytes", "torchao"):
        there = None if library in absent else types.ModuleType(library)
        monkeypatch.setitem(sys.modules, library, there)
        monkeypatch.setitem(sys.modules, f"{library}.optim", there)
    found, note = settle_optimizer(asked, torch.device("cpu"))
    assert found == runs
    assert note is None if said is None else re.search(said, note or "")
