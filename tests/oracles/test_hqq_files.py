"""The hqq library's own linears take whit's tensors and decode them to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
