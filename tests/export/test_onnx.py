"""ONNX folders: written, read back bit for bit, run from their codes; and what they cannot hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import whit
from whit.errors import RecipeError, UnsupportedModelError
from whit.integrations.loading import load_causal_lm
from whit.modules import PackedModule
from whit.pipeline import run
from whit.pipeline.job import Options, prepare
from whit.pipeline.transcode import prepare_transcode
from written import floats

from tiny_models import save_tiny, tiny_inputs

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
RULES = [("*", "int4-g32"), ("*up_proj", "int8-g64-asym"), ("*k_proj", "int2-g16-asym"), ("*o_proj", "bf16")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same codes as whit's own folder and as an ONNX one, by architecture."""
    folder = tmp_path_factory.mktemp("onnx")
    for name in ("llama-tied", "qwen2", "qwen3"):
        save_tiny(folder / name / "model", name, torch.bfloat16)
        rules = [*RULES, ("model.embed_tokens", "int8-g32")] if name != "qwen2" else RULES
        whit.quantize(folder / name / "model", folder / name / "whit", whit.Recipe(rules=rules))
        account = run(prepare_transcode(folder / name / "whit", folder / name / "onnx", "onnx", Options()))
        assert not any(entry.relative_error for entry in account.parameters)
        assert account.decoded is not None
        assert account.decoded["largest_error"] == 0
    return folder


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3"])
def test_round_trip_is_bit_exact(name: str, files: Path, tmp_path: Path):
    run(prepare_transcode(files / name / "onnx", tmp_path / "back", "whit", Options()))
    wanted = floats(files / name / "whit")
    for folder in (files / name / "onnx", tmp_path / "back"):
        found = floats(folder)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    before, after = load_file(files / name / "whit/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    codes = [key for key in before if key.endswith(".codes")]
    assert len(codes) == 12 + (name != "qwen2")
    assert all(torch.equal(before[key], after[key]) for key in codes)


def test_it_runs_from_its_codes(files: Path):
    model = load_causal_lm(str(files / "llama-tied/onnx"), dtype="float32", device="cpu")
    plain = load_causal_lm(str(files / "llama-tied/whit"), dtype="float32", device="cpu")
    assert sum(isinstance(module, PackedModule) for module in model.modules()) == 13
    with torch.no_grad():
        inputs = tiny_inputs("llama-tied")
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=0)


def test_files_beside_the_graph(files: Path):
    folder = files / "llama-tied/onnx"
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    ends = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    assert ends[0][:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert ends[1][:3] == ["logits", "present.0.key", "present.0.value"]
    names = {tensor.name for tensor in model.graph.initializer}
    assert names > {
        "model.layers.0.attn.q_proj.MatMul.weight_Q4", "model.layers.1.mlp.up_proj.MatMul.weight_zero_points",
        "model.embed_tokens.weight_Q8", "model.layers.2.final_norm_layernorm.weight", "cos_cache",
    }  # fmt: skip
    assert not any(name.startswith("lm_head") for name in names)  # tied: written once
    said = json.loads((folder / "genai_config.json").read_text())
    assert said["model"]["type"] == "llama"
    assert said["model"]["decoder"]["head_size"] == 16
    account = json.loads((folder / "whit.json").read_text())
    assert account["files"].keys() == {"model.onnx", "model.onnx.data"}
    assert not list(folder.glob("*.safetensors*"))
    assert account["size_bytes"] == sum((folder / name).stat().st_size for name in account["files"])


@pytest.mark.parametrize("architecture", ["gemma2", "mixtral", "gpt2"])
def test_other_architectures_are_refused(architecture: str, tmp_path: Path):
    save_tiny(tmp_path / "model", architecture)
    with pytest.raises(UnsupportedModelError, match="whit writes llama, mistral, qwen2, qwen3 there"):
        prepare(tmp_path / "model", tmp_path / "out", whit.Recipe(rules=[("*", "int4-g32")]), Options(), export="onnx")


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("int3-g32", "2, 4, 8 bits"), ("int8", "and not whole rows; use -g32"), ("nf4", "affine integers"),
        ("int4-g32-act", "gptq and gptq-v2 hold it"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_said(format: str, said: str, tmp_path: Path):
    save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    whit.quantize(tmp_path / "model", tmp_path / "whit", whit.Recipe(rules=[("*", format)]))
    with pytest.raises(RecipeError) as caught:
        prepare_transcode(tmp_path / "whit", tmp_path / "out", "onnx", Options())
    assert said in str(caught.value)
    assert "add --requantize" in str(caught.value)
