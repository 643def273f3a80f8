"""Whole checkpoints in another basis: every method after AWQ, what is written, resuming, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CodeGenConfig, CodeGenForCausalLM

import whit
from stopping import stop_and_go_on
from whit import AWQ, GPTQ, HQQ, RTN, Calibration, Clip, Options, Recipe
from whit.cli.quantize import build_recipe
from whit.methods import METHODS, parse_method
from whit.pipeline import quantize
from whit.pipeline.coverage import Account
from whit.pipeline.estimate import estimate
from whit.pipeline.job import open_source, prepare
from whit.report.comparison import Candidate
from written import logits, result

from tiny_models import ARCHITECTURES, save_tiny

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")

FORMATS = {"llama": "int3-g32-asym", "gpt2": "nf4-g32", "qwen3_moe": "int4-g32"}


def run(model: Path, out: Path, text: Path, recipe: Recipe, **options) -> Account:
    calibration = Calibration(text, samples=24, context=48)
    return quantize(model, out, recipe, calibration=calibration, options=Options(shard_size=40_000, **options))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose norms make every eighth channel salient."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name in FORMATS:
        path = save_tiny(folder / name, name, torch.bfloat16)
        weights = load_file(path / "model.safetensors")
        for key, value in weights.items():
            if "layers." in key and key.endswith(("layernorm.weight", "ln_1.weight", "ln_2.weight")):
                value[::8] *= 16
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        made[name] = path
    return made


MANY = [("llama", m.name) for m in METHODS] + [("gpt2", "clip"), ("gpt2", "gptq"), ("qwen3_moe", "gptq")]


@pytest.mark.parametrize(("architecture", "method"), MANY)
def test_every_method_after_awq(architecture: str, method: str, models, text: Path, tmp_path: Path):
    chosen = parse_method({"name": method, "steps": 4} if method in ("refine", "blocks") else method)
    calibration, recipe = (
        Calibration(text, samples=8, context=32),
        Recipe(chosen, [("*", FORMATS[architecture])], "awq"),
    )
    account = quantize(models[architecture], tmp_path / "out", recipe, calibration=calibration)
    changed = [e.name for e in account.parameters if e.status == "kept" and "rescaled by awq" in str(e.reason)]
    assert any("norm" in name or "ln_" in name for name in changed)
    assert all(e.proxy_loss is not None for e in account.parameters if e.status == "quantized")
    assert account.recipe is not None
    assert account.recipe["transform"] == {"name": "awq", "steps": 20}
    exact = logits(models[architecture])
    error = (logits(tmp_path / "out") - exact).square().mean() / exact.square().mean()
    assert float(error) < 0.3  # some of it are 3 bits of random weights; a wrong basis gives 1 and more


def test_awq_is_nearer_to_the_model_than_rounding(models, text: Path, tmp_path: Path):
    exact, rules = logits(models["llama"]), [("*", "int3-g32-asym")]
    quantize(models["llama"], tmp_path / "rtn", Recipe("rtn", rules))
    run(models["llama"], tmp_path / "awq", text, Recipe("rtn", rules, "awq"))
    plain, ours = (float((logits(tmp_path / name) - exact).square().mean()) for name in ("rtn", "awq"))
    assert ours < 0.8 * plain


def test_what_shares_an_input_is_one_matrix_after_awq_too(models, text: Path, tmp_path: Path, monkeypatch):
    rows, call = [], GPTQ.__call__

    def noted(method, weight, stats, format):
        rows.append(len(weight))
        return call(method, weight, stats, format)

    monkeypatch.setattr(GPTQ, "__call__", noted)
    run(models["llama"], tmp_path / "out", text, Recipe(GPTQ(), [("*", "int4-g32")], "awq"))
    assert sorted(rows) == 2 * [64] + 2 * [64] + 2 * [64 + 32 + 32] + 2 * [128 + 128]  # o; down; q, k, v; gate, up


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "t5"])
def test_nothing_but_the_basis_changes(architecture: str, text: Path, tmp_path: Path):
    """At 8 bits the dequantized result is the model, up to rounding, in every architecture."""
    model = save_tiny(tmp_path / "model", architecture)
    run(model, tmp_path / "out", text, Recipe("rtn", [("*", "int8-g32")], AWQ(steps=4)))
    source, done = open_source(model), open_source(tmp_path / "out")
    changed = [n for n in source.origins if n in done.origins and not torch.allclose(
        source.read(n).float(), done.read(n).float(), rtol=0.02, atol=0.02 * float(source.read(n).float().std() or 1)
    )]  # fmt: skip
    assert changed
    plain = ARCHITECTURES[architecture][0].from_pretrained(model)
    made = ARCHITECTURES[architecture][0].from_pretrained(model)
    state = made.state_dict()
    for name in done.origins:
        state[name].copy_(done.read(name))
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, ours = plain(tokens).logits, made(tokens).logits
    assert float((ours - exact).norm() / exact.norm()) < 0.02


def test_what_is_kept_in_16_bits_is_written_as_it_became(models, text: Path, tmp_path: Path):
    rules = [("*", "int4-g32"), ("*.k_proj", "bf16"), ("*.v_proj", "bf16")]
    account = run(models["llama"], tmp_path / "out", text, Recipe("rtn", rules, "awq"))
    entries = {e.name: e for e in account.parameters}
    source, done = open_source(models["llama"]), open_source(tmp_path / "out")
    norm, key = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight"
    scale = source.read(norm).float() / done.read(norm).float()
    assert float(scale.max()) > 1.5 * float(scale.min())
    assert torch.equal(done.read(key), (source.read(key).float() * scale).bfloat16())
    assert entries[norm].reason == "not the matrix of a linear or an embedding; rescaled by awq"
    assert entries[norm].relative_error == 0
    assert entries[key].reason == "a rule keeps it; rescaled by awq"
    assert 0 < (entries[key].relative_error or 0) < 2**-8


@pytest.mark.parametrize("architecture", list(FORMATS))
def test_a_stopped_run_ends_with_the_same_bytes_on_other_threads(
    architecture: str,
    models,
    text: Path,
    tmp_path: Path,
):
    recipe = Recipe("awq", [("*", FORMATS[architecture])])
    run(models[architecture], tmp_path / "whole", text, recipe)

    stop_and_go_on(partial(run, models[architecture], tmp_path / "parts", text, recipe), threads=(1, 2))
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_a_dry_run_says_what_will_be_and_that_the_search_takes_time(
    models,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("whit.pipeline.estimate._seconds", lambda method, format, shape, _: 1e-9 * shape[0] * shape[1])
    monkeypatch.setattr("whit.pipeline.estimate._rate", lambda *_: 1e10)  # what is measured is never the same twice
    rules, calibration = [("*", "int4-g32")], Calibration(text, samples=8, context=32)
    jobs = [
        prepare(models["llama"], tmp_path / "out", Recipe("clip", rules), Options()),
        prepare(models["llama"], tmp_path / "out", Recipe("awq", rules), Options(), calibration),
    ]
    plain, ours = (estimate(job) for job in jobs)
    assert ours.seconds > plain.seconds
    assert ours.memory_bytes > plain.memory_bytes
    assert ours.disk_bytes == plain.disk_bytes
    assert jobs[0].fingerprint != jobs[1].fingerprint
    assert not list(tmp_path.iterdir())


def test_another_transform_is_another_run(models, text: Path, tmp_path: Path):
    rules = [("*", "int4-g32")]
    run(models["llama"], tmp_path / "out", text, Recipe("gptq", rules))
    with pytest.raises(whit.WhitError, match="another model, recipe"):
        run(models["llama"], tmp_path / "out", text, Recipe("gptq", rules, "awq"))


def test_requests_that_cannot_be_met_are_refused_before_anything_is_read(
    models,
    text: Path,
    tmp_path: Path,
):
    recipe = Recipe("awq", [("*", "int4-g32")])
    tiny = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
    CodeGenForCausalLM(CodeGenConfig(**tiny)).save_pretrained(tmp_path / "codegen")
    with pytest.raises(whit.WhitError, match="'codegen' is not known; a transform such as awq needs one of "):
        prepare(tmp_path / "codegen", tmp_path / "out", recipe, Options())
    with pytest.raises(whit.WhitError, match="transform awq: needs calibration data"):
        AutoModelForCausalLM.from_pretrained(models["llama"], quantization_config=whit.QuantizationConfig(recipe))


def test_names_of_combinations():
    rules = [("*", "int4-g32")]
    assert Recipe("awq", rules) == Recipe(Clip(), rules, AWQ())
    assert Recipe("awq+gptq", rules) == Recipe(GPTQ(), rules, AWQ())
    assert Recipe("hqq", rules, "awq") == Recipe(HQQ(), rules, AWQ())
    assert Recipe(RTN(), rules, AWQ(steps=5)).needs_stats
    assert not Recipe("clip", rules).needs_stats
    assert Candidate.parse("awq+gptq:int4-g32").method == "awq+gptq"
    with pytest.raises(whit.WhitError, match="drop one of the two"):
        Recipe("awq", rules, AWQ())
    with pytest.raises(whit.WhitError, match="not a method"):
        Recipe("awq+gtpq", rules)


@pytest.mark.parametrize("recipe", [Recipe("awq"), Recipe("gptq", transform=AWQ(steps=7))])
def test_a_recipe_survives_toml(recipe: Recipe, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert whit.QuantizationConfig.from_dict(whit.QuantizationConfig(recipe).to_dict()).recipe == recipe


def test_the_command_line_names_a_transform(tmp_path: Path):
    rules = [("*", "int4-g32")]
    assert build_recipe("gptq", "int4-g32", None, None, "awq") == Recipe(GPTQ(), rules, AWQ())
    assert build_recipe("awq", "int4-g32", None, None) == Recipe(Clip(), rules, AWQ())
    (tmp_path / "recipe.toml").write_text(Recipe("awq", rules).to_toml())
    assert build_recipe(None, None, None, tmp_path / "recipe.toml") == Recipe("awq", rules)
    with pytest.raises(typer.BadParameter, match="drop --method, --transform"):
        build_recipe(None, None, None, tmp_path / "recipe.toml", "awq")


def test_a_recipe_may_name_awq_as_its_method(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('[method]\nname = "awq"\n')
    assert Recipe.load(tmp_path / "recipe.toml") == Recipe("awq")
