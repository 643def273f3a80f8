"""Whole checkpoints with quantized activations: calibrated, smoothed, resumed, loaded, exported."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stopping import stop_and_go_on
from whit import Calibration, Options, Recipe
from whit.errors import RecipeError
from whit.modules import QuantizedLinear
from whit.pipeline import dequantize, quantize
from whit.pipeline.coverage import Account, load_account
from written import difference, logits, result

from tiny_models import save_tiny, tiny_inputs

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def run(model: Path, out: Path, text: Path | None, recipe: Recipe, **options) -> Account:
    calibration = None if text is None else Calibration(text, samples=8, context=32)
    return quantize(model, out, recipe, calibration=calibration, options=Options(**options))


def test_static_scales_lie_beside_the_codes(model: Path, text: Path, tmp_path: Path):
    account = run(model, tmp_path / "out", text, Recipe("rtn", [("*", "w8a8-static"), ("lm_head", "int8")]))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{name}.input_scale"].shape == (1,)
    assert torch.equal(tensors[f"{name}.input_scale"], tensors[f"{name.replace('q_proj', 'v_proj')}.input_scale"])
    assert "lm_head.input_scale" not in tensors  # no block, and so no calibration: its weights alone are quantized
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["activations"] == "int8-static"
    assert config["inputs"][name] == "int8-static"
    assert "lm_head" not in config["inputs"]
    entries = {e.name: e for e in account.parameters}
    assert (entries[f"{name}.weight"].activations, entries["lm_head.weight"].activations) == ("int8-static", None)
    assert load_account(tmp_path / "out").parameters == account.parameters
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(loaded.model.layers[0].self_attn.q_proj.activations) == "int8-static"
    assert difference(tmp_path / "out", model) < 0.05
    dequantize(tmp_path / "out", tmp_path / "plain")
    assert not any("input_scale" in key for key in load_file(tmp_path / "plain" / "model.safetensors"))


@pytest.mark.parametrize("how", ["int8-static-asym", "int8-static-percentile99.9", "int8-static-mse-asym",
                                 "int8-static-entropy", "int8-static-moving0.1", "fp8-static"])  # fmt: skip
def test_every_way_to_choose_a_range(how: str, model: Path, text: Path, tmp_path: Path):
    format = "fp8" if how.startswith("fp8") else "int8"
    run(model, tmp_path / "out", text, Recipe("rtn", [("*", format)], activations=how))
    assert difference(tmp_path / "out", model) < 0.15
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    keys = {key for m in loaded.modules() if isinstance(m, QuantizedLinear) for key in m.packed.tensors}
    assert ("input_zero_point" in keys) == how.endswith("asym")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_smoothquant_loses_less_where_channels_stand_out(architecture: str, text: Path, tmp_path: Path):
    path = save_tiny(tmp_path / "model", architecture)
    network = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in network.named_parameters():
        if name.endswith(("layernorm.weight", "ln_1.weight", "ln_2.weight")):
            parameter.data[[3, 30]] *= 100
    network.save_pretrained(path)
    errors = {}
    for method in ("rtn", "smoothquant"):
        run(path, tmp_path / method, text if method != "rtn" else None, Recipe(method, [("*", "w8a8")]))
        errors[method] = difference(tmp_path / method, path)
    assert errors["smoothquant"] < 0.6 * errors["rtn"]


def test_a_killed_run_ends_with_the_same_bytes(model: Path, text: Path, tmp_path: Path):
    recipe = Recipe("smoothquant", activations="int8-static-mse")
    run(model, tmp_path / "whole", text, recipe)

    stop_and_go_on(partial(run, model, tmp_path / "killed", text, recipe))
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


@pytest.mark.parametrize("how", ["int8", "int8-static", "int8-g32-exact4"])
def test_an_encoder_takes_quantized_inputs_and_stays_near(how: str, text: Path, tmp_path: Path):
    path = save_tiny(tmp_path / "model", "bert-classifier")
    run(path, tmp_path / "out", None if how == "int8" else text, Recipe("rtn", [("*", "int8")], activations=how))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["inputs"]["bert.encoder.layer.0.output.dense"] == how
    assert ("bert.pooler.dense" in config["inputs"]) == (how == "int8")  # it is in no block
    inputs = tiny_inputs("bert-classifier")
    inputs["attention_mask"][0, 8:] = 0
    networks = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("model", "out")]
    with torch.no_grad():
        exact, found = (network(**inputs).logits for network in networks)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05


def test_files_that_cannot_say_it_refuse(model: Path, tmp_path: Path):
    for export in ("gptq", "gguf", "bf16"):
        with pytest.raises(RecipeError, match="activations int8"):
            quantize(model, tmp_path / export, Recipe("rtn", [("*", "w8a8")]), export=export)


def test_exporters_refuse_what_their_files_cannot_mean(model: Path, tmp_path: Path):
    for export, format, how, said in (
        ("compressed-tensors", "int8", "int8", "use --export compressed-tensors-int8"),
        ("compressed-tensors-int8", "int8", "int8-outliers", "no outlier columns"),
        ("bitsandbytes", "int8-absmax", "int8-asym", "use int8 or int8-outliers"),
    ):
        with pytest.raises(RecipeError, match=said):
            quantize(model, tmp_path / "out", Recipe("rtn", [("*", format)], activations=how), export=export)
    quantize(
        model, tmp_path / "bnb", Recipe("rtn", [("*", "llm.int8")], activations="int8-outliers"), export="bitsandbytes"
    )
    config = json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 6.0
    quantize(model, tmp_path / "bnb0", Recipe("rtn", [("*", "int8-absmax")], activations="int8"), export="bitsandbytes")
    assert (
        json.loads((tmp_path / "bnb0" / "config.json").read_text())["quantization_config"]["llm_int8_threshold"] == 0.0
    )


def test_some_linears_have_activations_of_their_own(model: Path, text: Path, tmp_path: Path):
    recipe = Recipe("rtn", [("*", "w8a8-static"), ("*down_proj", "w8a8")])
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    account = run(model, tmp_path / "out", text, recipe)
    found = {e.name: e.activations for e in account.parameters if e.activations}
    assert {how for name, how in found.items() if "down_proj" in name} == {"int8"}
    assert {how for name, how in found.items() if "down_proj" not in name} == {"int8-static"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(loaded.model.layers[0].mlp.down_proj.activations) == "int8"
    assert difference(tmp_path / "out", model) < 0.05
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "out"))
