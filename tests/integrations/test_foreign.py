"""evaluate and generate run other programs' files with whit's own modules: logits of the codes as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import whit
from whit.integrations.loading import load_causal_lm
from whit.modules import PackedModule
from whit.pipeline import dequantize

from tiny_models import save_tiny, tiny_inputs


@pytest.mark.parametrize(
    ("architecture", "export", "format", "count"),
    [
        ("llama", "gptq", "int4-g32", 14), ("llama", "awq", "int4-g32-asym", 14),
        ("llama-tied", "bitsandbytes", "nf4-dq", 14),
        ("gpt2", "gptq-v2", "int4-g32-asym", 8), ("mixtral", "compressed-tensors", "int4-g32", 12),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_gives_the_logits_of_whits_own(
    architecture: str, export: str, format: str, count: int, tmp_path: Path
):
    save_tiny(tmp_path / "model", architecture)
    whit.quantize(tmp_path / "model", tmp_path / "out", whit.Recipe(rules=[("*", format)]), export=export)
    model = load_causal_lm(str(tmp_path / "out"), dtype="float32", device="cpu")
    assert sum(isinstance(module, PackedModule) for module in model.modules()) == count
    whit.quantize(tmp_path / "model", tmp_path / "whit", whit.Recipe(rules=[("*", _fitted(export, format))]))
    plain = load_causal_lm(str(tmp_path / "whit"), dtype="float32", device="cpu")
    with torch.no_grad():
        inputs = tiny_inputs(architecture)
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=0)


def test_a_foreign_file_becomes_a_plain_one(tmp_path: Path):
    save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    whit.quantize(tmp_path / "model", tmp_path / "gptq", whit.Recipe(rules=[("*", "int4-g32")]), export="gptq")
    dequantize(tmp_path / "gptq", tmp_path / "plain")
    model = load_causal_lm(str(tmp_path / "plain"), device="cpu")
    assert not any(isinstance(module, PackedModule) for module in model.modules())


def _fitted(export: str, format: str) -> str:
    return f"{format}-f16" if format.startswith("int4") and export != "compressed-tensors" else format
