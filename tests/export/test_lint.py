"""The lint names what was damaged on purpose, and finds nothing wrong with what whit writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import whit
from whit.checkpoint.reader import Checkpoint, read_json
from whit.export.lint import Finding, lint
from whit.pipeline import run
from whit.pipeline.job import Options
from whit.pipeline.transcode import prepare_transcode

from tiny_models import save_tiny

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lint")
    save_tiny(folder / "model", "llama-tied", torch.bfloat16)
    for export, format in (
        ("gptq", "int4-g32"), ("gptq-v2", "int4-g32"), ("awq", "int4-g32-asym"), ("bitsandbytes", "nf4-dq"),
        ("compressed-tensors", "int4-g32"), ("mlx", "int4-g32"),
    ):  # fmt: skip
        whit.quantize(folder / "model", folder / export, whit.Recipe(rules=[("*", format)]), export=export)
    return folder


def found(folder: Path) -> list[Finding]:
    with Checkpoint(folder) as checkpoint:
        return lint(folder, read_json(folder / "config.json"), checkpoint)


def changed(folder: Path, out: Path, config: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> Path:
    """A copy with other tensors (None: without) and other keys of quantization_config."""
    shutil.copytree(folder, out)
    path = out / "model.safetensors"
    now = load_file(path)
    for key, tensor in tensors.items():
        now.pop(key, None)
        if tensor is not None:
            now[key] = tensor.contiguous()
    save_file(now, path)
    said = json.loads((out / "config.json").read_text())
    for key, value in (config or {}).items():
        said["quantization_config"].pop(key) if value is None else said["quantization_config"].update({key: value})
    (out / "config.json").write_text(json.dumps(said))
    return out


def problems(folder: Path) -> str:
    return "\n".join(str(finding) for finding in found(folder) if finding.kind == "problem")


@pytest.mark.parametrize("export", ["gptq", "gptq-v2", "awq", "bitsandbytes", "compressed-tensors", "mlx"])
def test_nothing_is_wrong_with_what_whit_writes(export: str, files: Path):
    assert problems(files / export) == ""


def test_versions_of_gptq(files: Path, tmp_path: Path):
    one = changed(files / "gptq", tmp_path / "one", {"checkpoint_format": "gptq_v2"})
    assert 'the file is version 1; set checkpoint_format to "gptq"' in problems(one)
    assert "(2 modules)" in problems(one)
    two = changed(files / "gptq-v2", tmp_path / "two", {"checkpoint_format": "gptq"})
    assert 'the file is version 2; set checkpoint_format to "gptq_v2"' in problems(two)
    assert "AutoGPTQ before version 2" in "\n".join(map(str, found(files / "gptq-v2")))


def test_zero_points_out_of_range(files: Path, tmp_path: Path):
    zeros = load_file(files / "gptq/model.safetensors")[f"{LAYER}.qzeros"]
    out = changed(files / "gptq", tmp_path / "out", **{f"{LAYER}.qzeros": torch.full_like(zeros, -1)})
    assert f"{LAYER}: 256 of 256 zero points are out of range: 16" in problems(out)
    assert "config.json says sym" in problems(out)


@pytest.mark.parametrize(
    ("export", "key"),
    [("gptq", "scales"), ("awq", "scales"), ("compressed-tensors", "weight_scale"), ("mlx", "scales")],
)
def test_scales_that_are_not_finite_or_missing(export: str, key: str, files: Path, tmp_path: Path):
    scale = load_file(files / export / "model.safetensors")[f"{LAYER}.{key}"]
    scale.reshape(-1)[3] = float("nan")
    out = changed(files / export, tmp_path / "nan", **{f"{LAYER}.{key}": scale})
    assert f"{LAYER}.{key}: 1 of 256 are not finite" in problems(out)
    without = changed(files / export, tmp_path / "none", **{f"{LAYER}.{key}": None})
    assert LAYER in problems(without)
    assert "is missing" in problems(without)


def test_claims_against_shapes(files: Path, tmp_path: Path):
    assert "says 8 bits, and the tensors hold 4" in problems(changed(files / "gptq", tmp_path / "bits", {"bits": 8}))
    assert "says group_size 64" in problems(changed(files / "awq", tmp_path / "size", {"group_size": 64}))
    groups = read_json(files / "compressed-tensors/config.json")["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["num_bits"] = 8
    out = changed(files / "compressed-tensors", tmp_path / "ct", {"config_groups": groups})
    assert "do not fit weight_shape [128, 64] in 8 bits" in problems(out)


def test_what_nothing_accounts_for(files: Path, tmp_path: Path):
    extra = changed(files / "gptq", tmp_path / "extra", **{"model.layers.9.mtp.weight": torch.zeros(3)})
    assert "model.layers.9.mtp.weight: is in the file and LlamaForCausalLM has no such parameter" in problems(extra)
    plain = torch.zeros(128, 64, dtype=torch.bfloat16)
    gone = {f"{LAYER}.{key}": None for key in ("qweight", "qzeros", "scales")}
    out = changed(files / "awq", tmp_path / "plain", **gone, **{f"{LAYER}.weight": plain})
    assert f"{LAYER}: has 16-bit weights and no exception" in problems(out)
    assert problems(changed(out, tmp_path / "named", {"modules_to_not_convert": [LAYER]})) == ""


def test_a_tied_head_written_twice(files: Path, tmp_path: Path):
    embedding = load_file(files / "awq/model.safetensors")["model.embed_tokens.weight"]
    twice = changed(files / "awq", tmp_path / "twice", **{"lm_head.weight": embedding.clone()})
    assert "note: lm_head.weight: is model.embed_tokens.weight again, 16,384 bytes" in "\n".join(map(str, found(twice)))
    other = changed(files / "awq", tmp_path / "other", **{"lm_head.weight": embedding + 1})
    assert "lm_head.weight: is stored and differs" in problems(other)


def test_tensors_that_config_does_not_speak_of(files: Path, tmp_path: Path):
    out = changed(files / "gptq", tmp_path / "out")
    config = read_json(out / "config.json")
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    assert "has quantized tensors, as 14 modules do" in problems(out)


def test_what_older_compressed_tensors_may_hold(files: Path, tmp_path: Path):
    """Zero points a byte each, one out of range; groups by an index, which newer versions do not read."""
    config = read_json(files / "compressed-tensors/config.json")["quantization_config"]["config_groups"]
    config["group_0"]["weights"]["symmetric"] = False
    zeros = torch.zeros(128, 2, dtype=torch.int8)
    zeros[0, 0] = 9
    index = torch.arange(64, dtype=torch.int32) % 2
    added = {f"{LAYER}.weight_zero_point": zeros, f"{LAYER}.weight_g_idx": index}
    out = changed(files / "compressed-tensors", tmp_path / "out", {"config_groups": config}, **added)
    assert f"{LAYER}.weight_zero_point: 1 of 256 zero points are out of range of 4 bits" in problems(out)
    said = "\n".join(map(str, found(out)))
    assert "compressed-tensors since 0.20: will not take 1 of 14 matrices: act-order by groups" in said


def test_act_order_and_padding_are_noted(files: Path, tmp_path: Path):
    index = torch.arange(64, dtype=torch.int32) % 2
    out = changed(files / "gptq", tmp_path / "order", **{f"{LAYER}.g_idx": index})
    assert f"note: {LAYER}: act-order" in "\n".join(map(str, found(out)))


def test_heads_that_predict_further_tokens_are_named(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a class of transformers that knows of them leaves them out: by name, or as blocks after the last one."""
    known = [r"^mtp.*", r"model\.layers\.2\..*", r"pooler"]
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", known)
    more = {
        "mtp.fc.weight": torch.zeros(3),
        "model.layers.2.eh_proj.weight": torch.zeros(3),
        "pooler.w": torch.zeros(3),
    }
    extra = changed(files / "gptq", tmp_path / "extra", **more)
    notes = [finding for finding in found(extra) if "multi-token prediction" in finding.message]
    assert {note.kind for note in notes} == {"note"}
    assert {note.where for note in notes} == {"mtp.fc.weight", "model.layers.2.eh_proj.weight"}
    account = run(prepare_transcode(extra, tmp_path / "out", "whit", Options()))
    dropped = {entry.name: entry.reason for entry in account.parameters if entry.status == "dropped"}
    assert dropped["mtp.fc.weight"] == "an auxiliary head (multi-token prediction), which transformers does not run"
    assert dropped["pooler.w"] == "transformers computes it itself"
