"""Whole checkpoints in rotated formats: named, calibrated, smoothed, loaded, exported, and where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import whit
from whit import Calibration, Recipe, quantize
from whit.errors import RecipeError, WhitError
from whit.export import EXPORTERS
from whit.pipeline import dequantize
from whit.qat import Course, Setting, Words, finish, learn, prepare_full, prepare_scales
from whit.rotation import rotate
from written import difference

from tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")

SPEC = "int8-channel+h64"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels of what the norms give are 100 times the others; so are two of what down_proj is given."""
    folder = save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")
    network = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in network.named_parameters():
        if name.endswith(("layernorm.weight", "up_proj.weight")):
            parameter.data[[3, 30]] *= 100
    network.save_pretrained(folder)
    return folder


def test_w8a8_with_a_rotation_loses_less_and_needs_no_data(llama: Path, tmp_path: Path):
    errors = {}
    for name in ("w8a8", "w8a8+h64", "llm.int8+h64"):
        recipe = Recipe("rtn", [("*", name)])
        assert not recipe.needs_stats
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        account = quantize(llama, tmp_path / name, recipe)
        assert account.decoded is None or account.decoded["largest"] == 0
        errors[name] = difference(tmp_path / name, llama)
    assert errors["w8a8+h64"] < 0.5 * errors["w8a8"]
    assert errors["llm.int8+h64"] < 0.8 * errors["w8a8"]
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "w8a8+h64").model.layers[0].mlp.down_proj
    assert (str(module.format), str(module.activations)) == (SPEC, "int8")
    dequantize(tmp_path / "w8a8+h64", tmp_path / "plain")  # in the model's own basis again
    assert difference(tmp_path / "plain", llama) < errors["w8a8+h64"] + 0.01


def test_static_scales_are_of_rotated_inputs(llama: Path, text: Path, tmp_path: Path):
    calibration = Calibration(text, samples=4, context=32)
    quantize(llama, tmp_path / "out", Recipe("rtn", [("*", "w8a8-static+h64")]), calibration=calibration)
    name, seen = "model.layers.0.self_attn.q_proj", []
    network = AutoModelForCausalLM.from_pretrained(llama)
    network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = calibration.tokens(whit.pipeline.job.load_tokenizer(""), 512).tokens
    with torch.no_grad():
        network(tokens)
    scale = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.input_scale"]
    torch.testing.assert_close(scale, (rotate(seen[0], 64).abs().max() / 127).reshape(1), rtol=1e-4, atol=0)


def test_smoothquant_and_gptq_take_rotated_matrices_too(llama: Path, text: Path, tmp_path: Path):
    errors = {}
    for label, method, rules in (
        ("smooth", "smoothquant", [("*", "int8")]),
        ("turned", "smoothquant", [("*", "int8"), ("*down_proj", "int8+h64")]),
        ("gptq", "smoothquant+gptq", [("*", "int8"), ("*down_proj", "int8+h64")]),
    ):
        quantize(llama, tmp_path / label, Recipe(method, rules), calibration=Calibration(text, samples=8, context=32))
        errors[label] = difference(tmp_path / label, llama)
    assert errors["turned"] < 1.05 * errors["smooth"]
    assert errors["gptq"] < 1.1 * errors["turned"]


def test_rotated_weights_made_while_loading_are_those_of_quantize_tensor(llama: Path):
    config = whit.QuantizationConfig("w8a8+h64")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    q = whit.quantize_tensor(AutoModelForCausalLM.from_pretrained(llama).model.layers[0].mlp.up_proj.weight.data, SPEC)
    assert torch.equal(model.model.layers[0].mlp.up_proj.dequantize(torch.float32), q.dequantize())


def test_experts_and_embeddings_go_without_and_it_is_said(tmp_path: Path):
    folder = save_tiny(tmp_path / "moe", "qwen3_moe")
    account = quantize(folder, tmp_path / "out", Recipe("rtn", [("*", "int8+h16"), ("model.embed_tokens", "int8+h16")]))
    for entry in account.parameters:
        if "experts" in entry.name or "embed" in entry.name:
            assert (entry.format, entry.reason) == ("int8-channel", "linears alone are rotated")
        if "q_proj" in entry.name:
            assert entry.format == "int8-channel+h16"


@pytest.mark.parametrize("export", [e.name for e in EXPORTERS if e.name not in ("whit", "bf16")])
def test_files_that_cannot_hold_one_say_so(llama: Path, export: str, tmp_path: Path):
    base = {"bitsandbytes": "nf4", "compressed-tensors-int8": "int8", "gguf": "q8_0", "hqq": "int4-g64-asym-fz"}
    size = 4 if export == "gguf" else 64
    with pytest.raises(WhitError) as refusal:
        quantize(
            llama, tmp_path / "out", Recipe("rtn", [("*", f"{base.get(export, 'int4-g64')}+h{size}")]), export=export
        )
    assert not (tmp_path / "out").exists()
    assert all(len(line.split()) > 4 for line in str(refusal.value).splitlines())


def test_what_cannot_be_rotated_is_said_before_a_weight_is_read(llama: Path, text: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"a rotation turns 256 columns at a time.*use \+h64"):
        quantize(llama, tmp_path / "out", Recipe("rtn", [("*", "int8+h256")]))


def test_training_is_done_in_the_basis_of_the_codes(llama: Path, text: Path, tmp_path: Path):
    """Trained whole with rounded inputs, or its scales alone: what is written is what was trained.

    The inputs are rounded where the packed model rounds them, after the turn.
    """
    calibration = Calibration(text, samples=8, context=32)
    quantize(llama, tmp_path / "start", Recipe("rtn", [("*", "int3-g16+h16")]))
    words = Words(tokens=calibration.tokens(whit.pipeline.job.load_tokenizer(""), 512).tokens)
    course = Course(steps=8, batch=4, rate=0.03, scale_rate=0.02)
    setting = Setting(calibration=calibration)
    full = prepare_full(
        llama,
        tmp_path / "full",
        Recipe("rtn", [("*", "int4-channel+h64")], activations="int8-static"),
        course,
        words,
        setting,
    )
    for training in (
        full,
        prepare_scales(tmp_path / "start", tmp_path / "scales", course, words, Setting(teacher=llama)),
    ):
        losses: list[float] = []
        values = learn(training, lambda what, step, total, loss, seen=losses: seen.append(loss))
        finish(training, values)
        assert losses[-1] < 0.9 * losses[0]
        packed = AutoModelForCausalLM.from_pretrained(training.job.out)
        for name, module in packed.named_modules():
            if isinstance(module, whit.modules.PackedModule):
                assert torch.equal(module.dequantize(torch.float32), values[f"{name}.weight"].dequantize())
    module = packed.model.layers[0].mlp.down_proj
    assert str(module.format) == "int3-g16+h16"
