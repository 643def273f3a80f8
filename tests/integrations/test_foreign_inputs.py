"""Inputs that another quantizer's file says are rounded are rounded: the model is not measured by its weights alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import whit
from whit.export.readers import inputs_of
from whit.integrations.loading import load_causal_lm
from whit.pipeline import run
from whit.pipeline.job import Options
from whit.pipeline.transcode import prepare_transcode

from tiny_models import save_tiny, tiny_inputs

LINEAR = "model.layers.0.mlp.up_proj"
CASES = (
    ("int8-channel", "int8", "compressed-tensors-int8"),
    ("int8-channel", "int8-tensor", "compressed-tensors-int8"),
    ("int8-channel", "int8-static-asym", "compressed-tensors-int8"),
    ("fp8-channel", "fp8", "compressed-tensors"),
    ("fp8-channel", "fp8-static", "compressed-tensors"),
    ("int8-absmax", "int8-outliers5", "bitsandbytes"),
)


@pytest.mark.parametrize(("format", "inputs", "export"), CASES, ids=lambda value: str(value))
def test_they_are_what_whit_s_own_file_has(format: str, inputs: str, export: str, tmp_path: Path):
    static = "static" in inputs  # calibrated, which takes a tokenizer
    model = "whit:model" if static else save_tiny(tmp_path / "model", "llama")
    calibration = whit.Calibration("whit:text", samples=1, context=32) if static else None
    recipe = whit.Recipe("rtn", [("*layers.0.*", format)], activations=inputs)
    for kind in ("whit", export):
        whit.quantize(model, tmp_path / kind, recipe, calibration=calibration, export=kind)
    found, meant = (load_causal_lm(str(tmp_path / kind), dtype="float32", device="cpu") for kind in (export, "whit"))
    assert str(found.get_submodule(LINEAR).activations) == inputs
    with torch.no_grad():
        wanted, logits = (each(**tiny_inputs("llama")).logits for each in (meant, found))
    assert torch.equal(logits, wanted)


def test_what_whit_cannot_do_is_said_and_left(tmp_path: Path):
    model = save_tiny(tmp_path / "model", "llama")
    whit.quantize(model, tmp_path / "q", whit.Recipe("rtn", [("*.mlp.*", "int8-channel")], activations="int8"),
                  export="compressed-tensors-int8")  # fmt: skip
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"]["num_bits"] = 4
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="num_bits 4.*the weights alone are measured"):
        found = load_causal_lm(str(tmp_path / "q"), dtype="float32", device="cpu")
    assert found.get_submodule(LINEAR).activations is None
    assert "num_bits 4" in prepare_transcode(tmp_path / "q", tmp_path / "w", "whit", Options()).notes[0]


def test_they_go_with_the_weights_into_another_kind_of_file(tmp_path: Path):
    model = save_tiny(tmp_path / "model", "llama")
    recipe = whit.Recipe("rtn", [("*.layers.0.*", "int8-channel")], activations="int8")
    whit.quantize(model, tmp_path / "q", recipe, export="compressed-tensors-int8")
    job = prepare_transcode(tmp_path / "q", tmp_path / "w", "whit", Options())
    run(job)
    config = json.loads((tmp_path / "w" / "config.json").read_text())["quantization_config"]
    assert config["inputs"][LINEAR] == "int8"
    assert not job.notes


def test_groups_are_found_as_compressed_tensors_finds_them():
    static = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    tokens = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    groups = {"a": {"targets": ["re:.*down_proj"], "input_activations": static},
              "b": {"targets": ["Linear"], "input_activations": tokens}}  # fmt: skip
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert str(inputs_of(config, "model.layers.1.mlp.down_proj")) == "fp8-static"
    assert str(inputs_of(config, LINEAR)) == "int8-asym"
    groups["b"]["targets"] = [LINEAR]
    assert inputs_of(config, "lm_head") is None
    assert inputs_of({"quant_method": "bitsandbytes", "load_in_8bit": True}, LINEAR).threshold == 6.0
    assert inputs_of({"quant_method": "bitsandbytes", "load_in_4bit": True}, LINEAR) is None
