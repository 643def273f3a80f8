"""Which examples a step sees, and that those of one row do not see each other."""

from __future__ import annotations

import inspect

import pytest
import torch

from whit.errors import TrainingError
from whit.training.adapters import check_packing
from whit.training.data import Example
from whit.training.packing import Portion, collate, pack, plan_evaluation, plan_steps

from tiny_models import tiny_model

LENGTHS = [5, 9, 16, 3, 7, 12, 4, 8, 6, 2]


def examples(lengths: list[int]) -> list[Example]:
    random = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(3, 128, (n,), generator=random), torch.rand(n, generator=random) < 0.5, i)
        for i, n in enumerate(lengths)
    ]


def test_rows_hold_every_example_once():
    rows = pack(range(len(LENGTHS)), LENGTHS, 16)
    assert sorted(i for row in rows for i in row) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[i] for i in row) <= 16 for row in rows)
    assert len(rows) <= 6  # 72 tokens need five rows of 16


@pytest.mark.parametrize("packing", [True, False])
def test_steps_are_a_function_of_the_seed(packing):
    portion = Portion(16, 2, 2, epochs=2.5, packing=packing)
    first, again, other = (plan_steps(LENGTHS, portion, seed) for seed in (0, 0, 1))
    assert first == again != other
    counts = torch.bincount(torch.tensor([i for step in first for rows in step for row in rows for i in row]))
    assert counts.min() >= 2
    assert counts.max() == 3
    assert all(len(step) == 2 and all(len(rows) == 2 for rows in step) for step in first[:-1])


def test_a_number_of_steps_goes_round_the_data():
    steps = plan_steps(LENGTHS, Portion(16, 2, 3, steps=7), 0)
    assert len(steps) == 7
    assert all(len(rows) == 2 for step in steps for rows in step)
    assert sum(len(row) for rows in plan_evaluation(LENGTHS, Portion(16, 2, 3)) for row in rows) == len(LENGTHS)


def test_targets_are_the_next_tokens_of_the_same_example():
    data = examples([5, 7, 4])
    batch = collate(((0, 1), (2,)), data, pad=0)
    assert batch.tokens.shape == (2, 16)
    flat = batch.tokens.flatten()
    wanted = [t for e in (data[0], data[1], data[2]) for t in e.tokens[1:][e.trained[1:]].tolist()]
    assert batch.targets.tolist() == wanted
    assert flat[batch.kept + 1].tolist() == wanted
    assert batch.positions[0].tolist() == [*range(5), *range(7), *range(4)]
    assert collate(((0,), (2,)), data, pad=0).positions is None  # plain causal attention keeps nothing apart


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_a_packed_example_has_the_logits_that_it_has_alone(architecture):
    with torch.random.fork_rng():
        model = tiny_model(architecture)
    data = examples([9, 6, 11])
    batch = collate(((0, 1, 2),), data, pad=0)
    with torch.no_grad():
        packed = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits[0]
        alone = [model(input_ids=e.tokens[None], use_cache=False).logits[0] for e in data]
    torch.testing.assert_close(packed[:26], torch.cat(alone), rtol=1e-4, atol=1e-5)
    check_packing(model)


def test_an_architecture_that_cannot_pack_is_refused():
    with torch.random.fork_rng():
        model = tiny_model("llama")
        forward = model.model.forward
    model.model.forward = lambda *a, position_ids=None, **k: forward(*a, **k)  # one that looks at no positions
    with pytest.raises(TrainingError, match=r"see each other; .* pass --no-packing"):
        check_packing(model)


def test_what_rounds_otherwise_in_rows_of_another_length_can_pack():
    with torch.random.fork_rng():
        model = tiny_model("llama")
    forward = model.forward
    with torch.no_grad():
        size = 0.05 * forward(input_ids=torch.arange(3, 19)[None]).logits.square().mean().sqrt()

    def rounded(input_ids, **options):
        found = forward(input_ids=input_ids, **options)
        noise = torch.randn(8192, generator=torch.Generator().manual_seed(input_ids.shape[1]))[: found.logits.shape[-1]]
        found.logits = found.logits + size * noise
        return found

    rounded.__signature__ = inspect.signature(forward)
    model.forward = rounded
    check_packing(model)
    inner = model.model.forward
    model.model.forward = lambda *a, position_ids=None, **k: inner(*a, **k)
    with pytest.raises(TrainingError, match="see each other"):
        check_packing(model)
