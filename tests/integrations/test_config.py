"""whit.QuantizationConfig: what it takes, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers as hf
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

import whit
from whit.errors import FormatError, RecipeError, WhitWarning
from whit.integrations.plan import plan_formats
from whit.integrations.transformers import WhitQuantizer, register

from tiny_models import tiny_model


def test_what_config_json_holds():
    config = whit.QuantizationConfig("nf4", double_quant=True, rules=[("lm_head", "int8")])
    config.formats = {"model.layers.0.mlp.up_proj": "nf4-dq", "lm_head": "int8-channel"}
    assert json.loads(config.to_json_string()) == {
        "quant_method": "whit",
        "version": 1,
        "layout": "bits",
        "method": {"name": "rtn"},
        "rules": [{"match": "*", "format": "nf4-dq"}, {"match": "lm_head", "format": "int8-channel"}],
        "formats": {"model.layers.0.mlp.up_proj": "nf4-dq", "lm_head": "int8-channel"},
    }


@pytest.mark.parametrize(
    "config",
    [
        whit.QuantizationConfig(),
        whit.QuantizationConfig("int4-g64-asym-fz", method="hqq", compute_dtype=torch.bfloat16),
        whit.QuantizationConfig(whit.Recipe("clip", [("*", "int3-g64"), ("*down_proj", "int8")])),
        whit.QuantizationConfig("int8", modules_to_not_convert=["lm_head"], skip_modules=["mlp.gate"]),
        whit.QuantizationConfig(whit.parse_format("nf4-dq")),
    ],
)
def test_round_trips_through_json(config: whit.QuantizationConfig):
    again = AutoQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert isinstance(again, whit.QuantizationConfig)
    assert again.to_dict() == config.to_dict()
    assert (again.recipe, again.compute_dtype) == (config.recipe, config.compute_dtype)


FOUR = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.bfloat16,
}  # fmt: skip


def test_options_typed_for_bitsandbytes_mean_what_they_meant_there():
    four = whit.QuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"], llm_int8_threshold=6.0,
        bnb_4bit_quant_storage=torch.uint8,
    )  # fmt: skip
    assert str(four.recipe.rules[0][1]) == "nf4-dq"
    assert four.compute_dtype is torch.bfloat16
    assert four.recipe.format_for("lm_head") is None
    assert four.recipe.activations is None
    assert str(whit.QuantizationConfig(load_in_4bit=True).recipe.rules[0][1]) == "fp4"
    eight = whit.QuantizationConfig(load_in_8bit=True, llm_int8_threshold=5.0).recipe
    assert eight == whit.QuantizationConfig("llm.int8", outlier_threshold=5.0).recipe
    assert whit.QuantizationConfig(load_in_8bit=True).recipe == whit.QuantizationConfig("llm.int8").recipe
    assert str(whit.QuantizationConfig(load_in_8bit=False).recipe.rules[0][1]) == "int4-g128"
    both = {**FOUR, "load_in_4bit": False, "load_in_8bit": True}  # what a script passes on, whichever was asked for
    assert whit.QuantizationConfig(**both).recipe == whit.QuantizationConfig("llm.int8").recipe
    assert whit.QuantizationConfig(**both).compute_dtype is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "weights have one format"),
        ({"format": "int8", "load_in_4bit": True}, "int8, and an option means fp4; give one"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type belongs to load_in_4bit=True"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "must be nf4 or fp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, "whit stores codes as bytes"),
        ({"format": whit.Recipe(), "method": "hqq"}, "a Recipe has its own method"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1.0}, r"threshold -1\.0; it must be a number, at least 0"),
        ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "threshold '6'; it must be a number, at least 0"),
        ({"load_in_8bit": True, "llm_int8_threshold": True}, "threshold True; it must be a number, at least 0"),
        ({"format": "int8", "activations": "int8-static-percentile40"}, r"percentile 40\.0; .* above 50"),
    ],
)
def test_options_of_bitsandbytes_that_contradict_each_other(options: dict, sentence: str):
    with pytest.raises(RecipeError, match=sentence):
        whit.QuantizationConfig(**options)


def test_compute_dtype_is_a_type_or_its_name():
    for given in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert whit.QuantizationConfig("int8", compute_dtype=given).compute_dtype is torch.bfloat16
    with pytest.raises(RecipeError, match=r"compute_dtype 'int8': not a floating-point type"):
        whit.QuantizationConfig("int8", compute_dtype="int8")


def test_skipped_modules_are_kept_with_all_inside_them():
    recipe = whit.QuantizationConfig("int8", modules_to_not_convert=["lm_head", "mlp"]).recipe
    kept = ["model.layers.0.mlp.up_proj", "mlp", "lm_head", "transformer.lm_head", "mlp.fc"]
    assert [recipe.format_for(name) for name in kept] == [None] * len(kept)
    assert recipe.format_for("model.layers.0.self_attn.q_proj") is not None
    assert recipe.format_for("model.layers.0.mlp_extra.fc") is not None
    assert whit.QuantizationConfig("int8", skip_modules="mlp").recipe.format_for("model.mlp.fc") is None


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.out_proj, self.fc = (torch.nn.Linear(32, 32) for _ in range(3))


@pytest.mark.parametrize(
    "names", [["proj"], ["fc"], [r"0\.(q|out)_proj"], ["1"], [r"[01]\..*_proj"], ["*.q_proj"], ["0.fc"]]
)
def test_what_is_skipped_is_what_transformers_skips(names: list[str]):
    """Ends of names and regular expressions too; a glob is no such expression, and whit's own."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = torch.nn.Sequential(Block(), Block())
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    try:
        wanted = [name for name in linears if not should_convert_module(name, names)]
    except re.error:
        wanted = ["0.q_proj", "1.q_proj"]
    config = whit.QuantizationConfig("int8", modules_to_not_convert=names)
    whit.quantize_model(model, whit.QuantizationConfig.from_dict(config.to_dict()))
    kept = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert kept == wanted


def test_a_name_that_keeps_nothing_is_said():
    with pytest.warns(WhitWarning, match=r"'q_prj' is the name of no module; did you mean q_proj\?"):
        whit.quantize_model(torch.nn.Sequential(Block()), "int8", skip_modules=["q_prj"])


def test_refuses_what_contradicts_itself():
    with pytest.raises(FormatError, match="did you mean nf4"):
        whit.QuantizationConfig("nf44")
    with pytest.raises(FormatError, match="it has no double quantization"):
        whit.QuantizationConfig("int8", double_quant=True)
    with pytest.raises(RecipeError, match=r"llm_int8_has_fp16_weight keeps weights in 16 bits.*--qat full"):
        whit.QuantizationConfig("llm.int8", llm_int8_has_fp16_weight=True)
    assert not whit.QuantizationConfig("llm.int8", llm_int8_has_fp16_weight=False).fp32_cpu_offload
    with pytest.raises(RecipeError, match="they are one option"):
        whit.QuantizationConfig("llm.int8", outlier_threshold=4.0, llm_int8_threshold=6.0)
    assert whit.QuantizationConfig("llm.int8", outlier_threshold=4.0, llm_int8_threshold=4.0)
    with pytest.raises(RecipeError, match="a Recipe has its own method"):
        whit.QuantizationConfig(whit.Recipe(), method="hqq")
    with pytest.raises(RecipeError, match=r"key 'bits' is not known; update whit"):
        whit.QuantizationConfig.from_dict({"quant_method": "whit", "version": 1, "bits": 4})
    with pytest.raises(RecipeError, match=r"option 'bits' does not exist; a format's name says it; write one"):
        whit.QuantizationConfig.from_dict({"quant_method": "whit", "bits": 4})
    with pytest.raises(RecipeError, match=r"option 'skip_module' does not exist; did you mean skip_modules?"):
        whit.QuantizationConfig("int8", skip_module=["lm_head"])
    with pytest.raises(RecipeError, match=r"modules to skip: is of type int; they must be a list of names"):
        whit.QuantizationConfig("int8", modules_to_not_convert=3)
    with pytest.raises(RecipeError, match="version 2"):
        whit.QuantizationConfig.from_dict({"quant_method": "whit", "version": 2})


@pytest.mark.parametrize(("name", "said"), [("w4a16", "int4-g128?"), ("4bit", "nf4?"), ("gptq", "the method gptq?")])
def test_names_of_other_programs_are_understood(name: str, said: str):
    with pytest.raises(FormatError, match=f"is not a format; did you mean .*{re.escape(said)}"):
        whit.QuantizationConfig(name)


def test_a_dictionary_of_options_is_a_configuration():
    options = {"quant_method": "whit", "format": "nf4", "double_quant": True}
    assert whit.QuantizationConfig.from_dict(options).to_dict() == whit.QuantizationConfig("nf4-dq").to_dict()


@pytest.mark.parametrize("wrong", [4, torch.int8])
def test_refuses_what_is_no_format(wrong: object):
    with pytest.raises(FormatError, match="is neither a name nor a Format"):
        whit.QuantizationConfig(wrong)  # type: ignore[arg-type]


def test_importing_whit_registers_it_once():
    register()
    quantizer = AutoHfQuantizer.from_config(whit.QuantizationConfig("int8"), pre_quantized=False)
    assert isinstance(quantizer, WhitQuantizer)
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    code = "import whit; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'whit' in m"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mix_gives_each_matrix_its_type():
    """The same types as the command line's, also after the configuration went through JSON."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=128, num_hidden_layers=2, **shape))
    config = whit.QuantizationConfig("q4_k_m", rules=[("*.1.mlp.up_proj", "int8-g32")])
    again = whit.QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    for recipe in (config.recipe, again.recipe, whit.QuantizationConfig(config.recipe).recipe):
        types = {target.holder: str(format) for target, format in plan_formats(model, recipe, {}).items()}
        assert types["model.layers.0.self_attn.q_proj"] == "q4_k"
        assert types["model.layers.1.mlp.down_proj"] == "q6_k"
        assert types["model.layers.1.mlp.up_proj"] == "int8-g32"
        assert types["lm_head"] == "q6_k"
    with pytest.raises(RecipeError, match="by group_size 256; q4_k has no other; use int4-g64"):
        plan_formats(tiny_model("llama"), config.recipe, {})
