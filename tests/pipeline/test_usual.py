"""What is taken where the user names no format: what the kind of file is usually asked for, and it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from whit.export import EXPORTERS, exporter_named
from whit.pipeline import quantize
from whit.pipeline.job import Options, prepare
from whit.pipeline.usual import with_usual
from whit.recipe import Recipe

from tiny_models import DECODER, save_tiny

TAKEN = {
    "gguf": "q4_k_m",
    "bitsandbytes": "nf4",
    "compressed-tensors-int8": "int8-channel",
    "compressed-tensors": "int4-g64",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("usual") / "model", "llama", torch.bfloat16)


@pytest.mark.parametrize("kind", [e.name for e in EXPORTERS if e.name not in ("bf16", "fp16", "fp32", "gguf")])
def test_every_kind_of_file_has_a_usual_format(kind: str, model: Path, tmp_path: Path):
    job = prepare(model, tmp_path / "out", Recipe(), Options(), export=kind)
    taken = TAKEN.get(kind, "int4-g64")
    assert job.notes[0].startswith(f"no format is named: {taken} is taken")
    assert ("since 64 columns are not a multiple of 128" in job.notes[0]) == (taken == "int4-g64")
    assert job.plan.formats
    assert not job.recipe.usual


def test_a_gguf_file_is_a_mix(model: Path, tmp_path: Path):
    job = prepare(model, tmp_path / "out.gguf", Recipe("clip"), Options(), export="gguf")
    assert job.notes == ("no format is named: q4_k_m is taken",)


def test_rules_methods_and_side_cars_stay(model: Path, tmp_path: Path):
    start = Recipe("hqq").with_side_cars(4)
    recipe = start.with_rules([*start.rules, ("lm_head", "int8")])
    job = prepare(model, tmp_path / "out", recipe, Options())
    assert [str(format) for _, format in job.recipe.rules] == ["int4-g64+r4", "int8-channel"]
    assert job.recipe.method.name == "hqq"
    smoothed, notes = with_usual(Recipe("smoothquant"), exporter_named("whit"), job.source.model)
    assert str(smoothed.rules[0][1]) == "int8-channel"
    assert notes == ("no format is named: int8-channel is taken",)


def test_what_is_named_is_never_changed(model: Path, tmp_path: Path):
    with pytest.raises(Exception, match="in_features 64 is not divisible by group_size 128; use int4-g64"):
        prepare(model, tmp_path / "out", Recipe(rules=[("*", "int4-g128")]), Options())
    assert Recipe() == Recipe(rules=[("*", "int4-g128")])  # as values they are one


def test_what_no_group_divides_is_kept_and_said(tmp_path: Path):
    """Gemma 3's part that sees has rows of 4304; the usual command on it was refused."""
    words = {**DECODER, "model_type": "llama"}
    sight = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"}  # fmt: skip
    config = LlavaConfig(text_config=words, vision_config=sight, image_token_index=5)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    for kind in ("whit", "gptq", "compressed-tensors"):
        job = prepare(tmp_path / "model", tmp_path / "out", Recipe(), Options(), export=kind)
        assert job.notes[0].startswith("no format is named: int4-g64 is taken, since 64 columns")
        assert job.notes[1].endswith("encoder.layers.*.mlp.fc2 is kept: no usual group divides its 80 columns")
        kept = [i.name for i in job.plan.items if i.reason == "a rule keeps it"]
        assert len(kept) == 3
        assert all(name.endswith("mlp.fc2.weight") for name in kept)
    own = Recipe().with_rules([*Recipe().rules, ("*.0.mlp.fc2", "int8-channel")])
    job = prepare(tmp_path / "model", tmp_path / "out", own, Options())
    assert sum(i.reason == "a rule keeps it" for i in job.plan.items) == 2
    with pytest.raises(Exception, match="in_features 80 is not divisible by group_size 64"):
        prepare(tmp_path / "model", tmp_path / "out", Recipe(rules=[("*", "int4-g64")]), Options())


def test_python_without_a_recipe(model: Path, tmp_path: Path):
    account = quantize(model, tmp_path / "out", export="bitsandbytes")
    assert {entry.format for entry in account.parameters if entry.format} == {"nf4"}


def test_where_it_comes_to_nothing_that_is_said(tmp_path: Path):
    sizes = {"hidden_size": 52, "intermediate_size": 99, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "model")
    job = prepare(tmp_path / "model", tmp_path / "out.gguf", Recipe(), Options(), export="gguf")
    assert not job.plan.formats
    assert job.notes[1] == "nothing is quantized: 52 columns are not a multiple of 256, which q4_k needs"
    floats = Recipe(rules=[("*", "bf16")])
    assert prepare(tmp_path / "model", tmp_path / "out.gguf", floats, Options(), export="gguf").notes == ()
