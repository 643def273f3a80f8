"""`whit quantize --target-size`: sizes met from below, replayed recipes, and less lost than by a uniform format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from small_budgets import TINY, TOKENS, undecided

import whit
from whit import Options, Recipe
from whit.allocation import (
    Group,
    budgeted,
    foresee,
    free_formats,
    measured,
    solve,
)
from whit.allocation.space import LADDER, bytes_of, methods_of
from whit.calibration import CalibrationTokens
from whit.cli.budget import Request, show_outlook
from whit.errors import RecipeError
from whit.evaluation import EvaluationOptions, evaluate
from whit.formats import parse_format
from whit.formats.bands import bands_of
from whit.memory.needs import OVERHEAD
from whit.methods import RTN
from whit.pipeline.coverage import load_account
from whit.pipeline.job import prepare

from tiny_models import save_tiny

pytest.importorskip("scipy")
UNIFORM = "int3-g64-asym"
LADDER3 = f"int2-g32-asym,{UNIFORM},int4-g64-asym"
SAMPLES = ("--samples", "1", "--context", "128")


@pytest.fixture
def run(whit: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """`whit quantize`: exit status and what was said."""
    return lambda *words: whit("quantize", *words)[::2]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_size_is_met_and_the_result_is_better_than_uniform(run, tmp_path: Path):
    whit.quantize("whit:model", tmp_path / "uniform", Recipe(None, [("*", UNIFORM), ("*.embed_tokens", UNIFORM)]))
    size = len(weights(tmp_path / "uniform"))
    saved = tmp_path / "recipe.toml"
    status, said = run(
        "whit:model", tmp_path / "out", "--target-size", size, "--save-recipe", saved, "--ladder", LADDER3, *SAMPLES
    )
    assert status == 0, said
    assert 0.995 * size <= len(weights(tmp_path / "out")) <= size
    account = load_account(tmp_path / "out")
    assert account.budget is not None
    assert account.measured is not None
    assert account.budget["unit"] == "nats per token"
    assert 0.3 < account.measured["kl"] / account.budget["expected"] < 3
    formats = [form for _, form in Recipe.load(saved).rules]
    chosen = {str(form) for f in formats for form, _ in getattr(f, "parts", ((f, 0),))}
    assert len(chosen) > 1
    assert chosen <= set(LADDER3.split(","))
    assert any(bands_of(form) is not None for form in formats)
    assert run("whit:model", tmp_path / "again", "--recipe", saved, *SAMPLES)[0] == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    how = EvaluationOptions(baseline="whit:model", max_tokens=1024, device="cpu")
    uniform, chosen = (evaluate(str(tmp_path / name), how).baseline for name in ("uniform", "out"))
    assert uniform is not None
    assert chosen is not None
    assert chosen.kl_mean < uniform.kl_mean


def test_rules_of_the_user_stay(tiny: Path, tmp_path: Path):
    job = undecided(tiny, tmp_path / "out", ("*.0.mlp.down_proj", "int8"), ("lm_head", "int8"))
    found = budgeted(job, 10**9, CalibrationTokens.of(TOKENS), TINY[:2])
    formats = {name: str(form) for name, form in found.plan.formats.items()}
    assert formats["model.layers.0.mlp.down_proj"].startswith("int8")
    assert formats["model.layers.1.mlp.down_proj"] == "int4-g32"
    assert formats["lm_head"].startswith("int8")
    assert formats["model.embed_tokens"] == "int4-g32"
    assert Recipe.from_dict(found.recipe.to_dict()) == found.recipe


def test_a_measure_serves_all_sizes_and_no_byte_depends_on_threads(tiny: Path, tmp_path: Path):
    job = undecided(tiny, tmp_path / "out")
    wanted, threads = free_formats(job, TINY), torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        groups = measured(job, TOKENS, wanted, "probe")
        found.append([solve(job, groups, size).recipe for size in (37_000, 45_000, 60_000)])
    torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert len({recipe.to_toml() for recipe in found[0]}) == 3


@pytest.mark.parametrize("how", ["kl", *(pytest.param(how, marks=pytest.mark.slow) for how in ("probe", "hessian"))])
def test_the_best_of_several_methods_is_chosen_matrix_by_matrix(how: str, tiny: Path, tmp_path: Path):
    """Whose errors are those of the method alone; a rule names it, and the recipe is the same in every run."""
    ladder = ("rtn:int3-g32", "clip:int3-g32", "gptq:int3-g32", "int8")
    job = undecided(tiny, tmp_path / "out")
    wanted, methods = free_formats(job, ladder), methods_of(job, ladder)
    low, high = map(parse_format, ("int3-g32", "int8"))
    assert {str(form): [m.name for m in several] for form, several in methods.items()} == {
        "int3-g32": ["rtn", "clip", "gptq"]
    }
    groups = measured(job, TOKENS, wanted, how, methods)
    alone = [measured(job, TOKENS, wanted, how, {low: (method,)}) for method in methods[low][:2]]
    for group, *each in zip(groups, *alone, strict=True):
        assert set(group.methods) == {low}
        least = min(one.errors[low] for one in each)
        assert group.errors[low] <= least * (1 + 1e-6)
        for one, method in zip(each, methods[low][:2], strict=True):
            if group.methods[low] == method and how != "hessian":  # where the probe's own error is in the unit
                assert group.errors[low] == pytest.approx(one.errors[low], rel=1e-5)
    chosen = {group.methods[low].name for group in groups}
    assert "gptq" in chosen
    size = sum(bytes_of(job, i, low) for i in job.plan.items if i.name in wanted)
    found = [budgeted(job, size + 24_000, CalibrationTokens.of(TOKENS), ladder, how) for _ in range(2)]
    (tmp_path / "recipe.toml").write_text(found[0].recipe.to_toml())
    assert found[0].recipe == found[1].recipe == Recipe.load(tmp_path / "recipe.toml")
    planned = {i.name: (i.format, i.method or RTN()) for i in found[0].plan.items if i.format is not None}
    assert any(form == low for form, _ in planned.values())
    for group in groups:
        for name in group.parameters:
            form, method = planned[name]
            assert method == group.methods.get(form, RTN())
    assert high in {form for form, _ in planned.values()}


def test_sizes_are_met_from_below_within_half_a_percent(tmp_path: Path):
    """Of the shipped model, whatever its errors."""
    job = undecided("whit:model", tmp_path / "out")
    draw = Random(0)
    groups = []
    for name, formats in free_formats(job, LADDER).items():
        share = 10 ** draw.uniform(-4, -1)
        groups.append(Group((name,), {f: share * 4.0**-f.bits for f in formats}))
    for bits in (2.5, 3.0, 3.5, 4.0, 4.5, 5.0):
        size = int(bits * job.plan.parameters / 8)
        found = solve(job, groups, size)
        assert 0.995 * size <= found.plan.size_bytes <= size


def test_a_size_that_cannot_be_met_is_refused_with_the_least(tiny: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="the smallest file"):
        budgeted(undecided(tiny, tmp_path / "out"), 1000, CalibrationTokens.of(TOKENS), TINY)


def test_what_fits_leaves_room_for_the_cache_and_the_process(tiny: Path, tmp_path: Path):
    job = undecided(tiny, tmp_path / "out")
    short, long = (Request(fit="600MB", context=context).bytes(job) for context in (16, 64))
    cache = 2 * 2 * 48 * 2 * 16 * 2  # keys and values, blocks, tokens more, heads, columns, bytes
    assert 600e6 - OVERHEAD["cpu"] > short > long + cache > 0
    wide = Request(fit="600MB", context=16, ladder="q4_k,int4-g32")  # superblocks are wider than its rows
    assert wide.bytes(job) >= short
    with pytest.raises(RecipeError, match="leaves nothing for the weights"):
        Request(fit="400MB", context=64).bytes(job)


def test_where_no_method_is_named_clipping_is_tried_too(tiny: Path, tmp_path: Path):
    job = undecided(tiny, tmp_path / "out")
    assert Request(bpw=3).formats(job) == LADDER
    more = Request(bpw=3, any_method=True).formats(job)[len(LADDER) :]
    assert {entry.partition(":")[0] for entry in more} == {"clip"}
    assert {f"clip:{form}" for form in ("int2-g64-asym", "int4-g32-asym")} <= set(more)
    assert not {"clip:q4_k", "clip:int8"} & set(more)  # a search of its own, and none that is needed
    tried = methods_of(job, Request(bpw=3, any_method=True).formats(job))
    assert {len(several) for several in tried.values()} == {2}
    assert Request(bpw=3, ladder="int2-g32,int8", any_method=True).formats(job) == ("int2-g32", "int8")


def test_contradictions_are_wrong_usage(run, tiny: Path, tmp_path: Path):
    for more in (("--target-bpw", 3), ("--format", "int8"), ("--recipe", "x.toml")):
        assert run(tiny, tmp_path / "out", "--target-size", "1MB", *more)[0] == 2
    assert run(tiny, tmp_path / "out", "--ladder", "int8")[0] == 2
    assert run(tiny, tmp_path / "out", "--sensitivity", "kl")[0] == 2
    assert run(tiny, tmp_path / "out", "--fit", "1GB", "--target-bpw", 3)[0] == 2


def test_another_result_in_the_way_is_said_before_the_model_is_measured(run, tiny: Path, tmp_path, monkeypatch):
    assert run(tiny, tmp_path / "out", "--format", "int8")[0] == 0
    monkeypatch.setattr("whit.cli.budget.budgeted", lambda *_: pytest.fail("measured"))
    status, said = run(tiny, tmp_path / "out", "--target-bpw", 4)
    assert status == 1
    assert "holds the result of another model" in said


def test_a_dry_run_says_between_which_files_a_size_lies_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr("whit.cli.budget.budgeted", lambda *_: pytest.fail("measured"))
    job, request = undecided("whit:model", tmp_path / "out"), Request(bpw=4.0, ladder=LADDER3)
    show_outlook(job, request, as_json=False)
    screen = capsys.readouterr().out
    for said in ("at most  ", ", 4.000 bits per weight", "smallest ", "largest ", "int3-g64-asym", "runs of the model"):
        assert said in screen
    show_outlook(job, replace(request, sensitivity="hessian"), as_json=False)
    assert "takes one run over the calibration text" in capsys.readouterr().out


def test_a_dry_run_refuses_what_cannot_be_met_and_writes_nothing(run, tmp_path: Path):
    words = ("whit:model", tmp_path / "out", "--ladder", LADDER3, "--dry-run")
    assert run(*words, "--target-bpw", "4", "--json") == (0, "")
    status, said = run(*words, "--target-bpw", "1")
    assert status == 1
    assert "the smallest file that the formats give" in said
    assert not list(tmp_path.iterdir())


def test_what_is_foreseen_are_the_files_of_the_ladders_ends(tmp_path: Path):
    model = save_tiny(tmp_path / "model", "llama")
    job = undecided(model, tmp_path / "out")
    found = foresee(job, 10**9, TINY, "kl")
    for spec, size in ((TINY[0], found.smallest_bytes), (TINY[-1], found.largest_bytes)):
        whole = Recipe(None, [("*", spec), ("model.embed_tokens", spec), ("lm_head", spec)])
        plan = prepare(model, tmp_path / "out", whole, Options()).plan
        assert size == pytest.approx(plan.size_bytes, abs=64)  # headers differ by names of rules
    assert (found.matrices, found.runs) == (16, 48)
    assert foresee(job, 10**9, TINY).runs == 32
