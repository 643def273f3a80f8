"""What all exporters promise: planned tensors, their inverse, the hub's names, and every misfit said before the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import whit
from whit.errors import RecipeError
from whit.export import EXPORTERS, Exporter
from whit.pipeline.job import Options, prepare
from whit.pipeline.plan import floats
from whit.pipeline.transcode import prepare_transcode

from tiny_models import save_tiny

FORMATS = {
    "whit": "nf4-dq", "gptq": "int4-g32", "gptq-v2": "int3-g32-asym", "awq": "int4-g32-asym", "bitsandbytes": "nf4-dq",
    "compressed-tensors": "int4-g32-asym", "compressed-tensors-int8": "int8", "mlx": "int4-g32-offset",
    "hqq": "int3-g32-asym-fz",
}  # fmt: skip

REFUSED = {
    *(("gpt2", export) for export in ("awq", "compressed-tensors", "compressed-tensors-int8", "mlx", "hqq")),
    *(("mixtral", export) for export in ("bitsandbytes", "mlx", "hqq")),
}


@pytest.mark.parametrize("export", FORMATS)
@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral", "gpt2"])
def test_tensors_are_as_planned_and_come_back(export: str, architecture: str, models: Path, tmp_path: Path):
    recipe = whit.Recipe(rules=[("*", FORMATS[export])])
    if (architecture, export) in REFUSED:
        with pytest.raises(RecipeError, match=r"Conv1D|a stack of experts"):
            prepare(models / architecture, tmp_path / "out", recipe, Options(), export=export)
        return
    job = prepare(models / architecture, tmp_path / "out", recipe, Options(), export=export)
    names = set()
    for item in job.plan.items:
        weight = job.source.read(item.name)
        value = weight if item.format is None else whit.RTN()(item.matrix(weight), None, item.format)
        tensors = job.exporter.tensors(item, value)
        assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == {
            k: (s.shape, s.dtype) for k, s in item.written.items()
        }
        assert not names & tensors.keys()
        names |= tensors.keys()
        restored = floats(item, job.exporter.restore(item, tensors))
        wanted = weight if item.format is None else item.parameter(value.dequantize())
        assert torch.equal(restored, wanted)


@pytest.mark.parametrize("export", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("architecture", ["gpt_oss", "llama4"])
def test_experts_that_checkpoints_hold_whole_are_no_linears(export: str, architecture: str, tmp_path: Path):
    """Each stack was written as one linear, which no program reads."""
    save_tiny(tmp_path / "model", architecture)
    with pytest.raises(RecipeError, match=r"experts.gate_up_proj .* which checkpoints hold whole; .* --export whit"):
        prepare(tmp_path / "model", tmp_path / "out", whit.Recipe(rules=[("*", "int4-g32")]), Options(), export=export)


def test_experts_are_written_one_by_one_under_the_hubs_names(models: Path, tmp_path: Path):
    whit.quantize(models / "mixtral", tmp_path / "out", whit.Recipe(rules=[("*", "int4-g32")]), export="gptq")
    names = load_file(tmp_path / "out/model.safetensors").keys()
    block = "model.layers.1.block_sparse_moe"
    assert f"{block}.gate.weight" in names
    assert {f"{block}.experts.{e}.w{w}.qweight" for e in range(4) for w in (1, 2, 3)} < names
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert r"-:^model\.layers\.1\.block_sparse_moe\.gate$" in config["dynamic"]


def test_modules_with_a_format_of_their_own(models: Path, tmp_path: Path):
    recipe = whit.Recipe(rules=[("*", "int4-g32"), ("*.0.mlp.up_proj", "int8-g64"), ("*.1.mlp.*", "bf16")])
    whit.quantize(models / "llama-tied", tmp_path / "gptq", recipe, export="gptq")
    dynamic = json.loads((tmp_path / "gptq/quantize_config.json").read_text())["dynamic"]
    assert dynamic[r"+:^model\.layers\.0\.mlp\.up_proj$"]["bits"] == 8
    assert r"-:^model\.layers\.1\.mlp\.down_proj$" in dynamic
    whit.quantize(models / "llama-tied", tmp_path / "ct", recipe, export="compressed-tensors")
    said = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    assert [group["weights"]["num_bits"] for group in said["config_groups"].values()] == [4, 8]
    assert "model.layers.1.mlp.up_proj" in said["ignore"]
    with pytest.raises(RecipeError, match="awq holds one format"):
        prepare(models / "llama-tied", tmp_path / "awq", recipe, Options(), export="awq")


@pytest.mark.parametrize(
    ("export", "rule", "said"),
    [
        ("gptq", ("*", "nf4"), "q_proj and 6 others (14 modules): nf4: gptq holds affine integers"),
        ("gptq", ("*", "int4-g32-asym"), "use --export gptq-v2"),
        ("gptq", ("model.embed_tokens", "int8"), "model.embed_tokens: an embedding in int8-channel-f16"),
        ("bitsandbytes", ("*", "int4-g32"), "bitsandbytes holds nf4 and fp4"),
        ("compressed-tensors", ("*", "int3-g32"), "2, 4, 8 bits"),
        ("mlx", ("*", "int4-g32-asym"), "symmetric or with an offset"),
        ("gtpq", ("*", "int4-g32"), "did you mean gptq?"),
    ],
)
def test_what_a_file_cannot_hold_is_said_before_the_run(export, rule, said: str, models: Path, tmp_path: Path):
    with pytest.raises(RecipeError) as caught:
        prepare(models / "llama-tied", tmp_path / "out", whit.Recipe(rules=[rule]), Options(), export=export)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", [kind for kind in FORMATS if kind != "whit"])
def test_a_file_of_quantized_linears_holds_one(export: str, models: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=f"nothing is quantized; {export} files hold quantized linears"):
        whit.quantize(models / "llama-tied", tmp_path / "out", whit.Recipe("rtn", [("*", "bf16")]), export=export)
    assert not list(tmp_path.iterdir())


def test_a_format_that_had_to_change_is_said(models: Path, tmp_path: Path):
    recipe = whit.Recipe(rules=[("*", "int4-g32")])
    job = prepare(models / "llama-tied", tmp_path / "out", recipe, Options(), export="gptq")
    assert job.notes == ("int4-g32: gptq files hold it as int4-g32-f16; that is written",)
    assert {str(format) for format in job.plan.formats.values()} == {"int4-g32-f16"}


@pytest.mark.parametrize("kind", [kind for kind in EXPORTERS if kind.name != "bf16"], ids=lambda kind: kind.name)
def test_the_format_that_a_sentence_proposes_is_one_that_the_file_holds(kind: type[Exporter], tmp_path: Path):
    if kind.suffix:  # a container of its own holds floats too
        assert not any(
            item.format for item in prepare_transcode("whit:model", tmp_path / "x", kind.name, Options()).plan.items
        )
    else:
        with pytest.raises(RecipeError, match=f"add --format, say {kind.example}$"):
            prepare_transcode("whit:model", tmp_path / "out", kind.name, Options())
    job = prepare("whit:model", tmp_path / "out", whit.Recipe(rules=[("*", kind.example)]), Options(), export=kind.name)
    assert any(item.format is not None for item in job.plan.items)


def test_what_a_gguf_file_cannot_hold_is_said_once_for_all_blocks(tmp_path: Path):
    with pytest.raises(RecipeError) as caught:
        prepare("whit:model", tmp_path / "out", whit.Recipe(rules=[("*", "int4-g128")]), Options(), export="gguf")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    said = "model.layers.*.self_attn.q_proj and 6 others (56 modules): int4-g128 is not a type of ggml"
    assert lines[0].startswith(said)
