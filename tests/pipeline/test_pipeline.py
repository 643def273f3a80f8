"""The whole run on tiny models: the account, the plan, determinism, and everything that must be refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import whit
from whit import Recipe
from whit.cli.inspect import verify_files
from whit.errors import CheckpointError, DeviceError, NonFiniteError, OutputError, RecipeError, UnsupportedModelError
from whit.export.dense import Dense, Float16, Float32
from whit.export.packed import PackedSource
from whit.model.source import Origin
from whit.model.targets import find_targets
from whit.pipeline import dequantize, quantize, run
from whit.pipeline.coverage import load_account
from whit.pipeline.estimate import estimate
from whit.pipeline.job import Job, Options, open_source, prepare
from whit.pipeline.parameter import relative_error
from whit.pipeline.plan import plan_dense
from whit.pipeline.sources import read_finite
from whit.recipe.preflight import check_recipe
from whit.tensor import TensorSpec
from written import weight_bytes

from tiny_models import ARCHITECTURES, save_tiny, tiny_model

INT4 = Recipe(rules=[("*", "int4-g32")])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama", torch.bfloat16, "60KB")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_accounted_for_exactly_once(architecture: str, tmp_path: Path):
    model = tiny_model(architecture)
    save_tiny(tmp_path / "model", architecture, shard_size="60KB")
    account = quantize(tmp_path / "model", tmp_path / "out", INT4)
    assert sorted(entry.name for entry in account.parameters) == sorted(model.state_dict())
    by_name = {entry.name: entry for entry in account.parameters}
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "gate" not in n]
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
        matrix = original[name].t() if target.transposed else original[name]
        expected = whit.RTN()(matrix.reshape(-1, matrix.shape[-1]), None, format).dequantize().reshape(matrix.shape)
        assert torch.equal(source.read(name), expected.t() if target.transposed else expected)


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


def dense(model: Path, out: Path, kind: type[Dense]) -> Job:
    job = prepare(model, out, None, Options())
    exporter = kind(job.source.model, model)
    return replace(job, exporter=exporter, plan=plan_dense(job.source, exporter))


KEPT = {"model.norm.weight": (3,), "model.embed_tokens.weight": (5, 2), "model.layers.0.input_layernorm.weight": (0,)}


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


def test_out_must_lie_elsewhere(llama: Path, tmp_path: Path):
    before = {path.name: path.stat().st_mtime_ns for path in llama.iterdir()}
    (tmp_path / "link").symlink_to(llama)
    (tmp_path / "file").write_text("")
    for out in (llama, llama / "deeper/out", llama.parent, tmp_path / "link/out", tmp_path / "file"):
        with pytest.raises(OutputError, match=r"MODEL|is a file"):
            quantize(llama, out, INT4)
    assert {path.name: path.stat().st_mtime_ns for path in llama.iterdir()} == before


def test_an_out_that_is_there(llama: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    first = quantize(llama, out, INT4)  # an empty folder is as good as none
    assert quantize(llama, out, INT4) == first
    other = Recipe(rules=[("*", "int8")])
    with pytest.raises(OutputError, match="pass --restart to replace it"):
        quantize(llama, out, other)
    assert quantize(llama, out, other, options=Options(restart=True)).bits_per_weight > first.bits_per_weight
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("keep me")
    with pytest.raises(OutputError, match="was not written by whit"):
        quantize(llama, foreign, INT4, options=Options(restart=True))
    assert (foreign / "precious.txt").exists()


def test_side_files_travel_and_code_and_pickles_do_not(tmp_path: Path):
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    shutil.copytree(save_tiny(tmp_path / "model", "llama"), snapshot)
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "modeling_x.py", "weights.bin", "LICENSE",
                 "quantize_config.json", "genai_config.json"):  # fmt: skip
        (blobs / name).write_text(name)
        (snapshot / name).symlink_to(blobs / name)
    quantize(snapshot, tmp_path / "out", INT4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE", "config.json", "generation_config.json",
        "model.safetensors", "README.md", "whit.json",
    }  # fmt: skip
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert "import whit" in (tmp_path / "out/README.md").read_text().split("```")[0]
    (tmp_path / "secret").write_text("password")
    (snapshot / "stolen.txt").symlink_to(tmp_path / "secret")
    begun: list[str] = []
    with pytest.raises(CheckpointError, match="outside of the model"):
        quantize(snapshot, tmp_path / "out2", INT4, options=Options(progress=lambda name, *_: begun.append(name)))
    assert not begun  # it was found out when all was done


def test_names_that_are_no_text(tmp_path: Path):
    """Bytes of a file system; the model card could not be written, when all was done."""
    folder = save_tiny(tmp_path / os.fsdecode(b"m\xff"), "llama")
    quantize(folder, tmp_path / os.fsdecode(b"o\xfe"), INT4)
    assert "# m?, quantized by whit" in (tmp_path / os.fsdecode(b"o\xfe") / "README.md").read_text()


def test_links_into_the_hubs_cache_are_followed(tmp_path: Path):
    """Folders that huggingface_hub filled with links to its cache."""
    folder, blobs = save_tiny(tmp_path / "model", "llama"), tmp_path / "hub/models--org--name/blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123").write_text("words")
    (folder / "vocab.txt").symlink_to(blobs / "0123")
    quantize(folder, tmp_path / "out", INT4)
    assert (tmp_path / "out/vocab.txt").read_text() == "words"


def test_parts_of_sentence_transformers_and_no_index_of_other_weights(tmp_path: Path):
    folder = save_tiny(tmp_path / "model", "bert")
    parts = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}, {"path": "../other"}]
    (folder / "modules.json").write_text(json.dumps(parts))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/secret.json").write_text("{}")
    quantize(folder, tmp_path / "out", INT4)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names >= {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert not names & {"onnx/config.json", "pytorch_model.bin.index.json"}
    assert not any("secret" in name for name in names)


def test_verify_names_the_file_that_changed(llama: Path, tmp_path: Path):
    account = quantize(llama, tmp_path / "out", INT4, options=Options(shard_size=50_000))
    verify_files(tmp_path / "out", account)
    name = sorted(account.files)[1]
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} changed since written"):
        verify_files(tmp_path / "out", account)


def test_relative_error_of_odd_matrices():
    ones = torch.ones(3, 5)
    assert relative_error(ones, ones * 1.5) == 0.5
    assert relative_error(torch.zeros(3, 5), torch.zeros(3, 5)) == 0
    assert relative_error(ones * 1e30, ones * 2e30) == 1
    assert relative_error(ones * 1e-40, ones * 0) == 1
    assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the system's figure is all there is")
def test_the_peak_is_not_that_of_the_process_that_began_this_one():
    ballast = bytearray(1_200_000_000)
    said = subprocess.check_output([sys.executable, "-c", "from whit.process import peak_memory; print(peak_memory())"])
    assert 0 < int(said) < len(ballast)
