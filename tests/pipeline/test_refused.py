"""What a run refuses in one sentence: weights that are not finite or not there, recipes and devices that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import whit
from families import save_family
from whit import Recipe
from whit.errors import CheckpointError, DeviceError, NonFiniteError, RecipeError, UnsupportedModelError
from whit.export.dense import Dense, Float16, Float32
from whit.model.source import Origin
from whit.pipeline import dequantize, quantize, run
from whit.pipeline.job import Job, Options, open_source, prepare
from whit.pipeline.plan import plan_dense
from whit.pipeline.sources import read_finite
from whit.recipe.preflight import check_recipe
from whit.tensor import TensorSpec

from tiny_models import save_tiny, tiny_model

INT4 = Recipe(rules=[("*", "int4-g32")])


KEPT = {"model.norm.weight": (3,), "model.embed_tokens.weight": (5, 2), "model.layers.0.input_layernorm.weight": (0,)}


def dense(model: Path, out: Path, kind: type[Dense]) -> Job:
    job = prepare(model, out, None, Options())
    exporter = kind(job.source.model, model)
    return replace(job, exporter=exporter, plan=plan_dense(job.source, exporter))


def test_all_that_does_not_fit_is_said_at_once(llama: Path, tmp_path: Path):
    recipe = Recipe(rules=[("*", "int4-g48"), ("lm_haed", "int8"), ("*.1.mlp.down_proj", "int8-g96")])
    with pytest.raises(RecipeError) as caught:
        prepare(llama, tmp_path / "out", recipe, Options())
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 3
    assert lines[0] == "rule 'lm_haed': matches no module of the model; it must match one; did you mean lm_head?"
    narrow = "model.layers.0.mlp.down_proj: in_features 128 is not divisible by group_size 48"
    assert f"{narrow}; use int4-g32, or add a rule for it" in lines
    assert (
        "model.layers.*.self_attn.q_proj and 5 others (12 modules): in_features 64 is not divisible by group_size 48; "
        "use int4-g32, or add a rule for it"
    ) in lines
    assert "model.layers.1.mlp.down_proj: in_features 128 is not divisible by group_size 96; use int8-g64" in str(
        caught.value
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_place(value: float, tmp_path: Path):
    save_tiny(tmp_path / "model", "llama")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 17] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"model.layers.1.mlp.up_proj.weight: {value} at position \[5, 17\]"):
        quantize(tmp_path / "model", tmp_path / "out", INT4)
    assert not (tmp_path / "out").exists()


def test_what_was_packed_and_is_kept_now_has_the_models_type(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    quantize(tmp_path / "model", tmp_path / "first", INT4.with_rules([*INT4.rules, ("lm_head", "int8")]))
    quantize(tmp_path / "first", tmp_path / "second", INT4)
    source, stored = open_source(tmp_path / "first"), load_file(tmp_path / "second/model.safetensors")
    assert torch.equal(stored["lm_head.weight"], source.read("lm_head.weight").to(torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_must_be_finite_too(name: str, value: float, tmp_path: Path):
    save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors[name][KEPT[name]] = value
    save_file(tensors, path, metadata={"format": "pt"})
    said = rf"^{name}: {value} at position \[{', '.join(map(str, KEPT[name]))}\]"
    ways = (
        lambda out: quantize(tmp_path / "model", out, INT4),
        lambda out: dequantize(tmp_path / "model", out),  # convert, where bytes are copied
        lambda out: run(dense(tmp_path / "model", out, Float32)),
    )
    for number, way in enumerate(ways):
        with pytest.raises(NonFiniteError, match=said):
            way(tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()


def test_a_weight_that_the_files_type_does_not_hold_is_named(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][7] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"^model.norm.weight: 9.98e\+04 is beyond float16's 6.55e\+04;"):
        run(dense(tmp_path / "model", tmp_path / "out", Float16))


def test_a_buffer_may_hold_infinities(tmp_path: Path):
    model = tiny_model("llama")
    model.model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    path = tmp_path / "model"
    model.save_pretrained(path)
    source = open_source(path)
    source.model.model.register_buffer("mask", torch.empty(2, 2))
    source.origins = {**source.origins, "model.mask": Origin(TensorSpec((2, 2), torch.float32), ("model.mask",))}
    assert read_finite(source, "model.mask").isinf().any()


def test_missing_parameters_and_wrong_shapes_are_all_named(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = torch.zeros(128, 63)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        prepare(tmp_path / "model", tmp_path / "out", INT4, Options())
    for part in ("model.norm.weight is missing", "up_proj.weight is missing", "lm_head.weight has shape [128, 63] for"):
        assert part in str(caught.value)


def test_a_missing_expert_is_named(tmp_path: Path):
    save_tiny(tmp_path / "model", "mixtral")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"0.mlp.experts.down_proj has shape \[3, 64, 128\] for \[4,"):
        prepare(tmp_path / "model", tmp_path / "out", INT4, Options())


def test_what_the_model_does_not_have_is_listed_as_dropped(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama")
    path = tmp_path / "model/model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.extra": torch.ones(1)}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    account = quantize(tmp_path / "model", tmp_path / "out", INT4)
    dropped = {entry.name: entry.reason for entry in account.parameters if entry.status == "dropped"}
    assert dropped == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "transformers computes it itself",
        "model.extra": "LlamaForCausalLM has no such parameter",
    }


def test_blocks_that_predict_further_ahead_are_called_so(tmp_path: Path):
    """Published models' own numbers of blocks (61, 92) were known alone, and others had "no such parameter"."""
    save_family(tmp_path / "model", "glm4_moe")
    path = tmp_path / "model/model.safetensors"
    extra = {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.3.eh_proj.weight": torch.ones(2)}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    account = quantize(tmp_path / "model", tmp_path / "out", Recipe(rules=[("*", "int8-g8")]))
    assert {entry.name: entry.reason for entry in account.parameters if entry.status == "dropped"} == {
        "model.layers.2.eh_proj.weight": "an auxiliary head (multi-token prediction), which transformers does not run",
        "model.layers.3.eh_proj.weight": "Glm4MoeForCausalLM has no such parameter",
    }


def test_hub_checkpoints_without_the_base_models_prefix(tmp_path: Path):
    save_tiny(tmp_path / "model", "gpt2")
    path = tmp_path / "model/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    account = quantize(tmp_path / "model", tmp_path / "out", INT4)
    assert "transformer.h.0.attn.c_attn.weight" in {e.name for e in account.parameters if e.status == "quantized"}


def test_architectures_that_nobody_knows(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    for change, expected in (
        ({"architectures": ["SlimeForCausalLM"]}, "has no architecture 'SlimeForCausalLM'"),
        ({"architectures": ["LlamaConfig"]}, "has no architecture 'LlamaConfig'"),
        ({"architectures": None}, "names no architecture"),
        ({"model_type": "slime"}, "model type 'slime'"),
        ({"model_type": "slime", "auto_map": {"AutoConfig": "x.Y"}}, "pass --trust-remote-code"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UnsupportedModelError, match=expected) as caught:
            prepare(tmp_path / "model", tmp_path / "out", INT4, Options())
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="says quantized by gptq, and no tensor is"):
        prepare(tmp_path / "model", tmp_path / "out", INT4, Options())
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        prepare(tmp_path / "model", tmp_path / "out", INT4, Options())


def test_a_method_that_needs_data_is_refused_without_it():
    class Needy(whit.RTN):
        name, needs_stats = "needy", True

    with pytest.raises(RecipeError, match="needy: needs calibration data"):
        check_recipe(Recipe(Needy(), [("*", "int8")]), {}, ["lm_head"])


def test_a_method_that_needs_data_needs_a_tokenizer(llama: Path, tmp_path: Path):
    class Needy(whit.RTN):
        name, needs_stats = "needy", True

    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        prepare(llama, tmp_path / "out", Recipe(Needy(), [("*", "int8")]), Options())


def test_a_missing_device_is_said(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = prepare(llama, tmp_path / "out", INT4, Options(device="cuda"))
    with pytest.raises(DeviceError, match="use --device cpu"):
        _ = job.device
    with pytest.raises(DeviceError, match="device tpu: unknown; it must be auto, cpu, cuda or cuda:N"):
        _ = replace(job, options=Options(device="tpu")).device
    assert replace(job, options=Options()).device.type == "cpu"
