"""Checkpoints that `whit.quantize` streams to disk load plainly, and equal what quantizing while loading gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loading_helpers import fake_quantized, logits, rules_for

import whit
from whit.modules import PackedModule

from tiny_models import ARCHITECTURES, save_tiny

FORMATS = ("int4-g32-asym", "nf4-g32-dq", "int8", "int3-g32", "fp8", "int4-g32")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("everything", [False, True])
def test_written_then_loaded(architecture: str, everything: bool, tmp_path: Path):
    model_class = ARCHITECTURES[architecture][0]
    original = save_tiny(tmp_path / "original", architecture, shard_size="60KB")
    format = FORMATS[list(ARCHITECTURES).index(architecture) % len(FORMATS)]
    recipe = whit.Recipe("rtn", rules_for(architecture, format, everything))
    whit.quantize(original, tmp_path / "out", recipe)
    model = model_class.from_pretrained(tmp_path / "out")
    assert any(isinstance(m, PackedModule) for m in model.modules())
    got = logits(model, architecture)
    wanted = logits(fake_quantized(model_class, original, recipe), architecture)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    fly = model_class.from_pretrained(original, quantization_config=whit.QuantizationConfig(recipe))
    assert torch.equal(logits(fly, architecture), got)
    assert fly.config.quantization_config.formats == model.config.quantization_config.formats
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(model_class.from_pretrained(tmp_path / "again"), architecture), got)
