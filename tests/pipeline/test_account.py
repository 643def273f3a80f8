"""What a run says of its parameters: the account, the plan, whit.json, and equal bytes however the work is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import whit
from whit import Recipe
from whit.cli.inspect import verify_files
from whit.errors import RecipeError
from whit.export.packed import PackedSource
from whit.model.targets import find_targets
from whit.pipeline import dequantize, quantize
from whit.pipeline.coverage import load_account
from whit.pipeline.estimate import estimate
from whit.pipeline.job import Options, open_source, prepare
from whit.pipeline.parameter import relative_error
from written import weight_bytes

from tiny_models import ARCHITECTURES, save_tiny, tiny_model

INT4 = Recipe(rules=[("*", "int4-g32")])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_accounted_for_exactly_once(architecture: str, tmp_path: Path):
    model = tiny_model(architecture)
    save_tiny(tmp_path / "model", architecture, shard_size="60KB")
    account = quantize(tmp_path / "model", tmp_path / "out", INT4)
    assert sorted(entry.name for entry in account.parameters) == sorted(model.state_dict())
    by_name = {entry.name: entry for entry in account.parameters}
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and "gate" not in n]
    heads = ("lm_head", "cls.predictions.decoder", "classifier", "vocab_projector")
    for name in (name for name in linears if not name.startswith(heads)):
        assert by_name[f"{name}.weight"].status == "quantized"
        assert 0.05 < by_name[f"{name}.weight"].relative_error < 0.2
    for name, owner in model.all_tied_weights_keys.items():
        assert by_name[name].status == "tied"
        assert by_name[name].reason == f"shares {owner}"
    stored = load_file(tmp_path / "out/model.safetensors")
    for entry in account.parameters:
        if entry.status == "kept":
            assert torch.equal(stored[entry.name], model.state_dict()[entry.name])
        if entry.status != "kept":
            assert entry.name not in stored


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_packed_comes_back_as_the_method_made_it(architecture: str, tmp_path: Path):
    save_tiny(tmp_path / "model", architecture)
    narrow = [("*relative_attention_bias", "bf16")] if architecture == "t5" else []  # 4 columns
    # `*` leaves embeddings and heads to the rule before it.
    quantize(tmp_path / "model", tmp_path / "out", Recipe(rules=[("*[!_]*", "int8"), ("*", "int4-g32"), *narrow]))
    original = tiny_model(architecture).state_dict()
    source = open_source(tmp_path / "out")
    assert isinstance(source, PackedSource)
    targets = {target.parameter for target in find_targets(source.model)}
    assert source.packed.keys() == {n for n in targets & source.origins.keys() if "relative_attention" not in n}
    for name, (target, format) in source.packed.items():
        matrix = original[name].mT if target.transposed else original[name]
        expected = whit.RTN()(matrix.reshape(-1, matrix.shape[-1]), None, format).dequantize().reshape(matrix.shape)
        assert torch.equal(source.read(name), expected.mT if target.transposed else expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "t5", "bert"])
def test_a_dequantized_model_is_a_plain_transformers_checkpoint(architecture: str, tmp_path: Path):
    save_tiny(tmp_path / "model", architecture, torch.bfloat16)
    quantize(tmp_path / "model", tmp_path / "out", INT4)
    account = dequantize(tmp_path / "out", tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    model_class = ARCHITECTURES[architecture][0]
    model, info = model_class.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    source = open_source(tmp_path / "out")
    for name in source.origins:
        assert torch.equal(model.state_dict()[name], source.read(name).to(torch.bfloat16))
    assert 0 < max(entry.relative_error or 0 for entry in account.parameters) < 0.01


def test_planned_bytes_are_the_bytes_written(llama: Path, tmp_path: Path):
    job = prepare(llama, tmp_path / "out", Recipe(rules=[("*", "nf4-dq"), ("lm_head", "int3-g64-asym")]), Options())
    account = quantize(llama, tmp_path / "out", job.recipe)
    written = sum(len(content) for content in weight_bytes(tmp_path / "out").values())
    assert job.plan.size_bytes == account.size_bytes == written
    parameters = sum(p.numel() for p in tiny_model("llama").parameters())
    assert account.bits_per_weight == job.plan.bits_per_weight == 8 * written / parameters
    verify_files(tmp_path / "out", account)


def test_config_holds_every_format_and_the_rest_as_it_was(llama: Path, tmp_path: Path):
    quantize(llama, tmp_path / "out", Recipe(rules=[("*", "int4-g32"), ("*.0.*", "nf4"), ("lm_head", "int8")]))
    config = json.loads((tmp_path / "out/config.json").read_text())
    found = config.pop("quantization_config")
    assert config == json.loads((llama / "config.json").read_text())
    assert found["quant_method"] == "whit"
    assert found["layout"] == "bits"
    assert found["formats"]["lm_head"] == "int8-channel"
    assert found["formats"]["model.layers.0.mlp.up_proj"] == "nf4"
    assert found["formats"]["model.layers.1.mlp.up_proj"] == "int4-g32"
    assert "model.embed_tokens" not in found["formats"]
    assert Recipe.from_dict({k: found[k] for k in ("version", "method", "rules")}).rules[1][0] == "*.0.*"


def test_whit_json_has_the_promised_keys(llama: Path, tmp_path: Path):
    account = quantize(llama, tmp_path / "out", INT4, options=Options(seed=3))
    found = json.loads((tmp_path / "out/whit.json").read_text())
    promised = {
        "version", "recipe", "seed", "calibration", "bits_per_weight", "size_bytes", "parameters", "seconds",
        "peak_memory_bytes", "libraries",
    }  # fmt: skip
    assert promised <= set(found)
    assert found["seed"] == 3
    keys = {"name", "status", "format", "reason", "bits_per_weight", "relative_error", "proxy_loss"}
    ours = {"tokens", "activations"}
    assert all(set(entry) == keys | ours for entry in found["parameters"])
    assert load_account(tmp_path / "out") == account


@pytest.mark.parametrize("method", ["rtn", "clip", "hqq"])
def test_threads_and_shards_change_no_weight(method: str, tmp_path: Path):
    import transformers as hf

    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256}
    hf.LlamaForCausalLM(hf.LlamaConfig(num_attention_heads=4, **size)).save_pretrained(tmp_path / "model")
    recipe = Recipe(method, [("*", "int4-g64-asym"), ("*.mlp.*", "nf4-dq"), ("lm_head", "int8")])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            quantize(tmp_path / "model", tmp_path / f"{threads}", recipe)
    finally:
        torch.set_num_threads(before)
    assert weight_bytes(tmp_path / "1") == weight_bytes(tmp_path / "2")
    quantize(tmp_path / "model", tmp_path / "sharded", recipe, options=Options(shard_size=100_000))
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(tmp_path / "1/model.safetensors")
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


def test_a_plan_reads_no_weights(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("whit.checkpoint.reader.read_bytes", read)
    job = prepare(llama, tmp_path / "out", INT4, Options())
    expected = estimate(job)
    assert expected.disk_bytes == job.plan.size_bytes
    assert expected.seconds > 0
    assert not list(tmp_path.iterdir())


def test_units_are_blocks(tmp_path: Path):
    save_tiny(tmp_path / "model", "t5")
    job = prepare(tmp_path / "model", tmp_path / "out", INT4, Options())
    names = [unit.name for unit in job.plan.units]
    assert [n for n in names if n.split(".")[-1].isdigit()] == [
        "encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1",
    ]  # fmt: skip
    assert len(set(names)) == len(names)


def test_a_rule_may_name_either_end_of_a_tie(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama-tied")
    for name in ("lm_head", "model.embed_tokens"):
        account = quantize(tmp_path / "model", tmp_path / name, Recipe(rules=[("*", "int4-g32"), (name, "int8")]))
        entries = {entry.name: entry for entry in account.parameters}
        assert entries["model.embed_tokens.weight"].format == "int8-channel"
        assert entries["lm_head.weight"].status == "tied"
    both = Recipe(rules=[("lm_head", "int8"), ("model.embed_tokens", "int4-g32")])
    with pytest.raises(RecipeError, match=r"embed_tokens and lm_head: one tied weight with the formats"):
        prepare(tmp_path / "model", tmp_path / "out", both, Options())


def test_two_stored_copies_are_tied_only_where_they_are_equal(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama-tied")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    for head, status in ((embedding.clone(), "tied"), (embedding + 1, "kept")):
        save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
        account = quantize(tmp_path / "model", tmp_path / status, INT4)
        assert {entry.name: entry.status for entry in account.parameters}["lm_head.weight"] == status


def test_relative_error_of_odd_matrices():
    ones = torch.ones(3, 5)
    assert relative_error(ones, ones * 1.5) == 0.5
    assert relative_error(torch.zeros(3, 5), torch.zeros(3, 5)) == 0
    assert relative_error(ones * 1e30, ones * 2e30) == 1
    assert relative_error(ones * 1e-40, ones * 0) == 1
    assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0
