"""compressed-tensors' own decompressor restores whit's weights bit for bit, and transformers loads the checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import whit
from whit.checkpoint.reader import read_json
from whit.integrations.loading import load_causal_lm
from whit.job import open_source

from tiny_models import save_tiny, tiny_inputs

compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
KINDS = {
    "int4-g32": ("compressed-tensors", "PackedQuantizationCompressor"),
    "int4-g32-asym": ("compressed-tensors", "PackedQuantizationCompressor"),
    "int8-g32-asym-f16": ("compressed-tensors", "PackedQuantizationCompressor"),
    "int4-channel": ("compressed-tensors", "PackedQuantizationCompressor"),
    "int8": ("compressed-tensors-int8", "IntQuantizationCompressor"),
    "fp8": ("compressed-tensors", "FloatQuantizationCompressor"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ct")
    save_tiny(folder / "model", "llama")
    for kind, (export, _) in KINDS.items():
        whit.quantize(folder / "model", folder / kind, whit.Recipe(rules=[("*", kind)]), export=export)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_its_decompressor_restores_the_weights(kind: str, folder: Path):
    from compressed_tensors.quantization import QuantizationConfig

    said = read_json(folder / kind / "config.json")["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    tensors, source = load_file(folder / kind / "model.safetensors"), open_source(folder / kind)
    names = [name for name in source.origins if source.entry(name) is None]
    assert len(names) == 14
    for name in names:
        module = name.removesuffix(".weight")
        state = {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}
        scale = state["weight_scale"].dtype
        found = getattr(compressors, KINDS[kind][1]).decompress(state, scheme)["weight"]
        assert torch.equal(found.to(scale), source.read(name).to(scale)), name


@pytest.mark.parametrize("kind", ["int4-g32", "int4-channel", "fp8"])
def test_transformers_computes_the_same_logits(kind: str, folder: Path):
    theirs = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32).eval()
    ours = load_causal_lm(str(folder / kind), dtype="float32", device="cpu")
    with torch.no_grad():
        found, wanted = theirs(**tiny_inputs("llama")).logits, ours(**tiny_inputs("llama")).logits
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-6
