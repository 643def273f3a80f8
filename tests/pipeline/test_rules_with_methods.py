"""Methods that rules name: in the file, on the command line, and in what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from whit import GPTQ, Calibration, Options, Recipe, Refine
from whit.errors import RecipeError
from whit.integrations.config import QuantizationConfig
from whit.methods import RTN
from whit.pipeline import quantize

from tiny_models import save_tiny

FORMAT = "int3-g32"


@pytest.fixture
def seen(text: Path, tiny_tokenizers: None) -> Calibration:
    return Calibration(text, samples=16, context=48)


def codes(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.endswith(".codes")}  # noqa: SIM118


def test_a_rule_may_name_a_method_and_a_file_holds_it(tmp_path: Path):
    rules = [("*", FORMAT), ("*.down_proj", "gptq:int4-g32"), ("*.1.*", "int8")]
    recipe = Recipe("rtn", rules, methods=[("*.0.*", GPTQ(refit=True))])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "recipe.toml") == Recipe.from_dict(recipe.to_dict()) == recipe
    assert QuantizationConfig.from_dict(QuantizationConfig(recipe).to_dict()).recipe == recipe
    assert recipe.method_for("model.layers.0.mlp.up_proj") == GPTQ(refit=True)
    assert recipe.method_for("model.layers.0.mlp.down_proj") == GPTQ()  # of those that match, the last
    assert recipe.method_for("model.layers.1.mlp.down_proj") == GPTQ()  # a later rule without one leaves it
    assert recipe.method_for("model.layers.1.mlp.up_proj") is None
    assert recipe.needs_stats
    assert recipe.with_rules([("*", "int8")]).methods == recipe.methods
    assert recipe.unmatched(["a.up_proj"]) == ("*.down_proj", "*.1.*", "*.0.*")


def test_a_rule_with_a_method_alone_and_wrong_ones(tmp_path: Path):
    found = Recipe.from_dict({"rules": [{"match": "*", "format": "int8"}, {"match": "*.0.*", "method": "hqq"}]})
    assert [(glob, method.name) for glob, method in found.methods] == [("*.0.*", "hqq")]
    for wrong, says in (
        ({"match": "*", "method": "gptk"}, "'gptk' is not a method"),
        ({"match": "*"}, "just `match` and `format`"),
    ):
        with pytest.raises(RecipeError, match=says):
            Recipe.from_dict({"rules": [wrong]})


def test_every_matrix_has_the_codes_of_its_own_method(seen: Calibration, tmp_path: Path):
    """In the first block, whose inputs are the same whatever is chosen; the embedding is rounded, not calibrated."""
    model = save_tiny(tmp_path / "model", "llama")
    options = Options(device="cpu")
    mixed = Recipe("rtn", [("*", FORMAT), ("*embed_tokens", f"clip:{FORMAT}"), ("*.o_proj", f"gptq:{FORMAT}")])
    recipes = {
        "mixed": mixed,
        **{m.name: Recipe(m, [("*", FORMAT), ("*embed_tokens", FORMAT)]) for m in (RTN(), GPTQ())},
    }
    accounts = {}
    for name, recipe in recipes.items():
        used = seen if recipe.needs_stats else None
        accounts[name] = quantize(model, tmp_path / name, recipe, calibration=used, options=options)
    found, rounded, calibrated = (codes(tmp_path / name) for name in recipes)
    for name, value in found.items():
        if ".0." in name:
            same, other = (calibrated, rounded) if "o_proj" in name else (rounded, calibrated)
            assert torch.equal(value, same[name])
            assert not torch.equal(value, other[name])
    assert torch.equal(found["model.embed_tokens.codes"], calibrated["model.embed_tokens.codes"])  # clip, without data
    reasons = {e.name: e.reason for e in accounts["mixed"].parameters}
    assert reasons["model.layers.1.self_attn.o_proj.weight"] == "by gptq, as a rule says"
    assert reasons["model.layers.1.self_attn.q_proj.weight"] is None
    again = quantize(model, tmp_path / "again", Recipe.from_dict(mixed.to_dict()), calibration=seen, options=options)
    assert again.files == accounts["mixed"].files


@pytest.mark.slow
def test_a_block_is_refined_around_what_other_methods_chose(seen: Calibration, tmp_path: Path):
    model, options = save_tiny(tmp_path / "model", "llama"), Options(device="cpu")
    refine = Refine(steps=12, batch=8, rate=0.03)
    mixed = Recipe("rtn", [("*", FORMAT)], methods=[("*.down_proj", refine)])
    quantize(model, tmp_path / "mixed", mixed, calibration=seen, options=options)
    for name, method in (("rtn", RTN()), ("start", refine.start), ("all", refine)):
        used = seen if method.needs_stats else None
        recipe = Recipe(method, [("*", FORMAT)])
        quantize(model, tmp_path / name, recipe, calibration=used, options=options)
    found, rounded, start = (codes(tmp_path / name) for name in ("mixed", "rtn", "start"))
    down, up = (f"model.layers.0.mlp.{name}_proj.codes" for name in ("down", "up"))
    assert torch.equal(found[up], rounded[up])
    assert not torch.equal(found[down], start[down])
    assert not torch.equal(found[down], codes(tmp_path / "all")[down])  # the others hold other codes meanwhile
