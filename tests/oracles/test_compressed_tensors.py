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
from whit.pipeline.job import open_source

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


ACTIVATIONS = [
    ("fp8", "fp8", 1e-6), ("fp8", "fp8-tensor", 1e-6), ("fp8", "fp8-static", 1e-6), ("int8", "int8-static-asym", 0.02),
    ("int8", "int8", 0.02), ("int8", "int8-asym", 1e-6), ("int8", "int8-tensor", 0.02),
]  # fmt: skip


@pytest.mark.usefixtures("tiny_tokenizers")
@pytest.mark.parametrize(("format", "how", "near"), ACTIVATIONS)
def test_it_quantizes_activations_as_whit_does(format: str, how: str, near: float, folder: Path, text: Path):
    """Exactly in fp8; its int8 scale is max|x| / 127.5, and so other values are rounded other ways."""
    recipe, model = whit.Recipe("rtn", [("*", format)], activations=how), folder / "model"
    calibration = whit.Calibration(text, samples=4, context=32) if "static" in how else None
    export = "compressed-tensors-int8" if format == "int8" else "compressed-tensors"
    whit.quantize(model, folder / f"whit-{how}", recipe, calibration=calibration)
    whit.quantize(model, folder / f"ct-{how}", recipe, calibration=calibration, export=export)
    networks = [
        AutoModelForCausalLM.from_pretrained(folder / f"{kind}-{how}", dtype=torch.float32) for kind in ("whit", "ct")
    ]
    with torch.no_grad():
        ours, theirs = (network(**tiny_inputs("llama")).logits for network in networks)
    assert ((ours - theirs).norm() / theirs.norm()).item() < near
    assert (
        load_file(folder / f"ct-{how}" / "model.safetensors").keys() >= {"model.layers.0.mlp.up_proj.input_scale"}
    ) == ("static" in how)
