"""Rules, their order, and the file they travel in."""

from __future__ import annotations

from pathlib import Path

import pytest

import whit
from whit import HQQ, Recipe
from whit.errors import FormatError, RecipeError


def test_the_last_rule_that_matches_counts():
    recipe = Recipe(rules=[("*", "int4-g128"), ("*.mlp.*", "int3-g64"), ("*.0.mlp.down_proj", "bf16")])
    assert str(recipe.format_for("model.layers.1.self_attn.q_proj")) == "int4-g128"
    assert str(recipe.format_for("model.layers.1.mlp.up_proj")) == "int3-g64"
    assert recipe.format_for("model.layers.0.mlp.down_proj") is None


def test_heads_and_embeddings_need_a_rule_that_names_them():
    assert Recipe().format_for("lm_head", kept_by_default=True) is None
    assert Recipe(rules=[("model.*", "int8")]).format_for("model.embed_tokens", True) is None
    for pattern in ("lm_head", "lm_*", "*head"):
        assert str(Recipe(rules=[(pattern, "int8")]).format_for("lm_head", True)) == "int8-channel"


def test_a_recipe_survives_toml(tmp_path):
    recipe = Recipe(HQQ(beta=2.5), [("*", "nf4-dq"), ('odd"name\\*', "codebook(-1,0.1,1)-g32")])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("versoin = 1", "key 'versoin' does not exist"),
        ("version = 7", "version 7"),
        ("[[rules]]\nmatch = '*'", "just `match` and `format`"),
        ("[[rules]]\nmatch = '*'\nformat = 'int44'", "did you mean int4"),
        ("[method]\nname = 'hqq'\nbtea = 1", "option 'btea' does not exist"),
        ("= 3", "not TOML"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(tmp_path, text: str, says: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises((RecipeError, FormatError), match=says):
        Recipe.load(path)


def test_rules_that_match_nothing_are_found():
    assert Recipe(rules=[("*", "int8"), ("*.q_prj", "int4-g32")]).unmatched(["a.q_proj"]) == ("*.q_prj",)
    assert issubclass(RecipeError, whit.WhitError)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("name = 'hqq', p = 3", "hqq: p 3; it must be from 0 to 1"),
        ("name = 'hqq', beta = 0", "hqq: beta 0; it must be at least 1e-06"),
        ("name = 'hqq', kappa = nan", "hqq: kappa nan; it must be finite"),
        ("name = 'hqq', iterations = 2.5", "hqq: iterations 2.5; it must be a whole number"),
        ("name = 'clip', steps = 0", "clip: steps 0; it must be at least 1"),
        ("name = 'gptq', damp = 'much'", "gptq: damp 'much'; it must be a number"),
        ("name = 'gptq', damp = inf", "gptq: damp inf; it must be finite"),
        ("name = 'gptq', act_order = 1", "gptq: act_order 1; it must be true or false"),
        ("name = 'blocks', reach = 2.0", "method blocks: option 'reach' does not exist"),
        ("name = 'blocks', slow = 1", "blocks: slow 1; an average would never move"),
        ("name = 'refine', start = 'rtn'", "refine: start 'rtn'; it must be another method"),
    ],
)
def test_options_of_another_type_or_out_of_range_are_one_sentence(option: str, said: str, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(f"method = {{ {option} }}\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "recipe.toml")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("method = 3", "method = 3; it must be a text or a table"),
        ("transform = [1]", r"transform = \[1\]; it must be a text or a table"),
        ("rules = 5", "rules = 5; it must be a list of tables"),
        ("activation_rules = 'int8'", "activation_rules = 'int8'; it must be a list of tables"),
        ("[[rules]]\nmatch = 3\nformat = 'int8'", "a rule: match = 3; it must be a text"),
        ("[[rules]]\nmatch = '*'\nmethod = 3", "a rule: method = 3; it must be a text or a table"),
        ("[[activation_rules]]\nmatch = '*'\nactivations = 3", "a rule: activations = 3; it must be"),
        ("version = '1'", "version = '1'; it must be a number"),
    ],
)
def test_values_of_another_type_are_one_sentence(content: str, said: str, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(RecipeError, match=f"recipe.toml: {said}"):
        Recipe.load(tmp_path / "recipe.toml")


def test_a_folder_is_no_recipe(tmp_path: Path):
    with pytest.raises(RecipeError, match="is a directory; it must be a recipe in TOML"):
        Recipe.load(tmp_path)
