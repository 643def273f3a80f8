"""Blocks that run one at a time see what they see in the whole model, in every architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import whit
from whit.calibration.capture import EXPERT_TOKENS, BlockStats, Watch
from whit.calibration.runner import Runner
from whit.calibration.storage import INPUT_MEMORY, Storage
from whit.model.graph import find_foldings
from whit.model.groups import GROUPS
from whit.model.targets import find_targets
from whit.tensor import LayerStats

from tiny_models import ARCHITECTURES, tiny_config, tiny_model

CPU = torch.device("cpu")
SINGLE = [name for name in ARCHITECTURES if name != "t5"]


def windows(samples: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (samples, 32), generator=torch.Generator().manual_seed(seed))


def runner_of(model, tokens: torch.Tensor, folder: Path, memory: int = INPUT_MEMORY) -> Runner:
    state = model.state_dict()
    return Runner(model, lambda name: state[name].clone(), tokens, CPU, Storage(folder, memory), twice=False)


def capture(run: Callable[[], None], parameters: Mapping[str, torch.Tensor]) -> BlockStats:
    watch = Watch(parameters)
    with watch:
        run()
    return watch.stats()


def look(runner: Runner, index: int) -> None:
    for sample in runner.inputs:
        runner.forward(index, sample[None])


def stats_of(runner: Runner, index: int, names: set[str]) -> BlockStats:
    with runner.loaded(index) as parameters:
        watched = {name: p for name, p in parameters.items() if name in names}
        return capture(lambda: look(runner, index), watched)


def block_targets(model) -> set[str]:
    return {t.parameter for t in find_targets(model) if not t.kept_by_default}


@torch.no_grad()
@pytest.mark.parametrize("architecture", SINGLE)
def test_blocks_one_at_a_time_are_the_whole_model(architecture: str, tmp_path: Path):
    model, tokens = tiny_model(architecture), windows()
    runner = runner_of(model, tokens, tmp_path)
    whole: list[torch.Tensor] = []
    last = model.get_submodule(runner.names[-1])
    last.register_forward_hook(lambda _m, _a, out: whole.append(out[0] if isinstance(out, tuple) else out))
    for row in tokens:
        model.base_model(input_ids=row[None])
    for index in range(len(runner.names)):
        with runner.loaded(index):
            runner.run(index)
    assert torch.equal(runner.inputs, torch.cat(whole))
    assert all(p.is_meta for p in runner.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("architecture", SINGLE)
def test_hessians_are_those_of_each_linears_inputs(architecture: str, tmp_path: Path):
    model, tokens = tiny_model(architecture), windows()
    runner, names = runner_of(model, tokens, tmp_path), block_targets(model)
    stats = stats_of(runner, 0, names)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in stats.stats:
            module.register_forward_hook(lambda _m, args, _o, name=name: seen.setdefault(name, []).append(args[0]))
    for row in tokens:
        model.base_model(input_ids=row[None])
    assert seen
    for name, inputs in seen.items():
        x = torch.cat(inputs).reshape(-1, inputs[0].shape[-1]).double()
        (found,) = stats.of(f"{name}.weight")
        assert found.token_count == tokens.numel()
        assert torch.allclose(found.hessian.double(), x.T @ x, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [name for name in SINGLE if tiny_model(name).config.model_type in GROUPS])
def test_the_table_of_groups_is_what_a_running_block_shows(architecture: str, tmp_path: Path):
    model = tiny_model(architecture)
    runner = runner_of(model, windows(), tmp_path)
    with runner.loaded(0) as parameters:
        watched = {n: p for n, p in parameters.items() if p.dim() > 1 and not n.endswith("_bias")}
        observed = capture(lambda: look(runner, 0), watched).groups
    together = {frozenset(group) for group in observed}
    for folding in find_foldings(model)[runner.names[0]]:
        # Each expert sees tokens of its own, so that experts stand alone when observed.
        linears = frozenset(name for name in folding.consumers if ".experts." not in name)
        assert not linears or linears in together, f"{folding.weight} feeds {sorted(map(sorted, together))}"


@torch.no_grad()
def test_experts_have_statistics_of_their_own(tmp_path: Path):
    model, tokens = tiny_model("mixtral"), windows(40)
    runner = runner_of(model, tokens, tmp_path)
    stats = stats_of(runner, 0, block_targets(model))
    name = f"{runner.names[0]}.mlp.experts.gate_up_proj"
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.get_submodule(f"{runner.names[0]}.mlp.experts")
    experts.register_forward_pre_hook(lambda _m, args: routed.append(args[:2]))
    for row in tokens:
        model.base_model(input_ids=row[None])
    x, chosen = torch.cat([r[0] for r in routed]).double(), torch.cat([r[1] for r in routed])
    for i, found in enumerate(stats.stats[name]):
        mine = x[(chosen == i).any(dim=1)]
        assert found.token_count == len(mine)
        assert torch.allclose(found.hessian.double(), mine.T @ mine, rtol=1e-5, atol=1e-4)
    assert sum(s.token_count for s in stats.stats[name]) == 2 * tokens.numel()


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "experts"), [("gpt_oss", "0.mlp.experts"), ("llama4", "1.feed_forward.experts")]
)
def test_so_have_experts_that_lie_in_by_out(architecture: str, experts: str, tmp_path: Path):
    """gpt-oss multiplies x @ W, expert after expert; Llama 4 all at once, by zeros where a token is another's."""
    model, tokens = tiny_model(architecture), windows(40)
    parent = model.get_submodule(f"model.layers.{experts}")
    seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}

    def note(_module, args):
        if architecture == "gpt_oss":
            for i in range(4):
                seen[i].append(args[0][(args[1] == i).any(dim=1)])
        else:
            for i, x in enumerate(args[0].view(4, -1, 64)):
                seen[i].append(x[x.abs().sum(1) > 0])

    parent.register_forward_pre_hook(note)
    for row in tokens:
        model.base_model(input_ids=row[None], use_cache=False)
    runner = runner_of(model, tokens, tmp_path)
    for index in range(int(experts[0])):
        with runner.loaded(index):
            runner.run(index)
    names = {f"model.layers.{experts}.{part}_proj" for part in ("gate_up", "down")}
    stats = stats_of(runner, int(experts[0]), names)
    for i, found in enumerate(stats.stats[f"model.layers.{experts}.gate_up_proj"]):
        mine = torch.cat(seen[i]).double()
        assert found.token_count == len(mine) == stats.stats[f"model.layers.{experts}.down_proj"][i].token_count
        assert torch.allclose(found.hessian.double(), mine.T @ mine, rtol=1e-4, atol=1e-4)
    counts = [s.token_count for s in stats.stats[f"model.layers.{experts}.down_proj"]]
    assert sum(counts) == tiny_config(architecture).num_experts_per_tok * tokens.numel()


def test_an_expert_that_saw_too_little_gets_the_statistics_of_all():
    rich = LayerStats(torch.eye(4), EXPERT_TOKENS)
    poor = LayerStats(3 * torch.eye(4), EXPERT_TOKENS - 1)
    stats = BlockStats({"e": (rich, poor), "one": (poor,)}, (("e",), ("one",)))
    first, second = stats.of("e")
    assert first is rich
    assert torch.equal(second.hessian, 4 * torch.eye(4))
    assert second.token_count == 2 * EXPERT_TOKENS - 1
    assert stats.starved("e") == (1,)
    assert stats.of("one") == (poor,)
    assert not stats.starved("one")


@torch.no_grad()
def test_a_parameter_that_no_token_reached_is_named(tmp_path: Path):
    runner = runner_of(tiny_model("llama"), windows(), tmp_path)
    with (
        runner.loaded(0) as parameters,
        pytest.raises(whit.WhitError, match=r"layers\.0\.self_attn\.q_proj\.weight: no token"),
    ):
        capture(lambda: None, parameters)


@torch.no_grad()
def test_statistics_do_not_depend_on_threads_or_on_where_inputs_lie(tmp_path: Path):
    model, tokens = tiny_model("llama"), windows(8)
    names, found = block_targets(model), []
    before = torch.get_num_threads()
    try:
        for threads, budget in ((1, 1 << 30), (2, 0)):
            torch.set_num_threads(threads)
            runner = runner_of(model, tokens, tmp_path, budget)
            with runner.loaded(0):
                runner.run(0)
            found.append(stats_of(runner, 1, names))
    finally:
        torch.set_num_threads(before)
    for name in found[0].stats:
        assert torch.equal(found[0].of(name)[0].hessian, found[1].of(name)[0].hessian)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_drift_pairs_each_input_with_the_unquantized_models(architecture: str, tmp_path: Path):
    model, tokens = tiny_model(architecture), windows()
    state = model.state_dict()
    runner = Runner(model, lambda name: state[name].clone(), tokens, CPU, Storage(tmp_path), twice=True)
    assert runner.exact is not None
    noise = 0.1 * torch.randn(runner.inputs.shape, generator=torch.Generator().manual_seed(3))
    runner.inputs += noise
    with runner.loaded(0) as parameters:
        names = [name for name in parameters if name in block_targets(model)]
        watch, seen = Watch({name: parameters[name] for name in names}), []
        holder = names[0].rpartition(".")[0]
        runner.model.get_submodule(holder).register_forward_pre_hook(
            lambda _m, args: seen.append(args[0].flatten(0, -2))
        )
        with watch:
            for number, sample in enumerate(runner.inputs):
                with watch.exact():
                    runner.forward(0, runner.exact[number][None])
                runner.forward(0, sample[None])
    stats = watch.stats()
    exact, own = torch.cat(seen[::2]), torch.cat(seen[1::2])
    for name in names:
        (drifts,) = {s.drift is None for s in stats.stats[name]}
        assert drifts == ("experts" in name)
    (first,) = stats.stats[names[0]]
    torch.testing.assert_close(first.drift, (exact - own).T @ own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.hessian, own.T @ own, rtol=1e-4, atol=1e-4)
