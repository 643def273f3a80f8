"""The hqq library's own linears take whit's tensors and decode them to the same weights, and the other way about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import whit
from whit.pipeline.job import open_source

from tiny_models import save_tiny

quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")


FORMATS = ("int4-g32-asym-fz", "int4-g32", "int8-g32-asym", "int3-g32-asym", "int2-g32", "int1-g32")


@pytest.mark.parametrize("format", FORMATS)
def test_their_linear_decodes_the_same(format: str, tmp_path: Path):
    save_tiny(tmp_path / "model", "llama")
    whit.quantize(tmp_path / "model", tmp_path / "out", whit.Recipe(rules=[("*", format)]), export="hqq")
    tensors, source = load_file(tmp_path / "out/model.safetensors"), open_source(tmp_path / "out")
    names = [name for name in source.origins if source.entry(name) is None]
    assert len(names) == 14
    for name in names:
        module = name.removesuffix("weight")
        state = {key.removeprefix(module): t for key, t in tensors.items() if key.startswith(module)}
        linear = quantize.HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
        linear.load_state_dict(state)
        wide = {key: linear.meta[key].float() for key in ("scale", "zero")}  # in float16 it rounds q - zero too
        found = quantize.Quantizer.dequantize(linear.W_q, {**linear.meta, **wide, "compute_dtype": torch.float32})
        assert torch.equal(found, source.read(name)), name


OPTIONS = {
    "int8-g32-f32": {"nbits": 8}, "int4-g32-f32": {"nbits": 4}, "int3-g32-f32": {"nbits": 3},
    "int2-g32-f32": {"nbits": 2}, "int1-g32-f32": {"nbits": 1}, "int4-g32": {"nbits": 4, "view_as_float": True},
    "axis 0": {"nbits": 4, "axis": 0}, "axis 0, 3 bits": {"nbits": 3, "axis": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_files_of_their_own_saving(kind: str, tmp_path: Path):
    """Their config.json does not say that anything is quantized."""
    base = pytest.importorskip("hqq.models.hf.base", reason="hqq is not installed")
    save_tiny(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    config = quantize.BaseQuantizeConfig(**{"group_size": 32, "axis": 1, **OPTIONS[kind]})
    dtype = torch.bfloat16 if "view_as_float" in OPTIONS[kind] else torch.float32
    base.AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
    base.AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "out"))
    source, count = open_source(tmp_path / "out"), 0
    for name, module in model.named_modules():
        if isinstance(module, quantize.HQQLinear):
            meta = {**module.meta, "compute_dtype": torch.float32}
            wide = {key: meta[key].float() for key in ("scale", "zero")}
            wanted = quantize.Quantizer.dequantize(module.W_q, {**meta, **wide})
            assert torch.equal(source.read(f"{name}.weight"), wanted), name
            count += 1
    assert count == 14
