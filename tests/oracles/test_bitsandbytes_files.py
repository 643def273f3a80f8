"""transformers and bitsandbytes load what whit writes for them: the same logits, and the tensors that they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import whit
from whit.pipeline.job import Options, prepare

from tiny_models import save_tiny, tiny_inputs

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bnb")
    for architecture in ("llama", "gpt2"):
        save_tiny(folder / architecture, architecture)
        for kind in KINDS:
            out = folder / f"{architecture}-{kind}"
            account = whit.quantize(folder / architecture, out, whit.Recipe(rules=[("*", kind)]), export="bitsandbytes")
            assert account.decoded is not None
            assert account.decoded["largest_error"] == 0
            assert account.decoded["parameters"] == {"llama": 14, "gpt2": 8}[architecture]
    return folder


def loaded(folder: Path, **options: object) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    for module in model.modules():  # else the first forward repacks the weights for this processor
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32
        if isinstance(module, bnb.nn.Linear8bitLt):  # in evaluation it rounds activations to 8 bits too
            module.train()
    return model


def reference(folder: Path, kind: str) -> torch.nn.Module:
    """The same weights dequantized by whit, in a plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    job = prepare(folder, folder.parent / "none", whit.Recipe(rules=[("*", kind)]), Options(), export="bitsandbytes")
    state = model.state_dict()
    for item in job.plan.items:
        if item.format is not None:
            matrix = item.matrix(state[item.name])
            state[item.name].copy_(item.parameter(whit.RTN()(matrix, None, item.format).dequantize()))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bitsandbytes_computes_our_logits_from_our_files(architecture: str, kind: str, folder: Path):
    inputs = tiny_inputs(architecture)
    theirs, ours = loaded(folder / f"{architecture}-{kind}"), reference(folder / architecture, kind)
    packed = [m for m in theirs.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert len(packed) == {"llama": 14, "gpt2": 8}[architecture]
    with torch.no_grad():
        found, wanted = theirs(**inputs).logits, ours(**inputs).logits
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_that_bitsandbytes_writes(kind: str, folder: Path, tmp_path: Path):
    config = BitsAndBytesConfig(**KINDS[kind])
    # Its 8-bit linears round weights to float16 first, which these are made to bear.
    source = folder / "llama"
    dtype = torch.float16 if kind == "int8" else torch.float32
    if kind == "int8":
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(tmp_path / "half")
        source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config).save_pretrained(
        tmp_path / "theirs"
    )
    whit.quantize(source, tmp_path / "ours", whit.Recipe(rules=[("*", kind)]), export="bitsandbytes")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name and kind == "nf4-dq":  # ours ends in spaces: its length is planned ahead
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(ours[name].tolist()))
        else:
            assert tensor.dtype == ours[name].dtype, name
            assert torch.equal(tensor, ours[name]), name
