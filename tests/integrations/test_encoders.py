"""Encoders in 8 and 4 bits by their Auto classes, with padding: loaded, run, saved, loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import whit
from whit.modules import QuantizedLinear

from tiny_models import tiny_config, tiny_inputs

TASKS = {"sentence": AutoModel, "classifier": AutoModelForSequenceClassification}


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("spec", ["int8", "int4-g32"])
def test_padded_batches_give_what_each_sequence_gives(tmp_path: Path, architecture: str, task: str, spec: str):
    torch.manual_seed(0)
    exact = TASKS[task].from_config(tiny_config(architecture)).eval()
    exact.save_pretrained(tmp_path / "plain")
    config = whit.QuantizationConfig(spec)
    model = TASKS[task].from_pretrained(tmp_path / "plain", quantization_config=config)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) >= 12
    tokens = tiny_inputs(architecture)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    with torch.no_grad():
        both, alone = model(input_ids=tokens, attention_mask=mask)[0], model(input_ids=tokens[:1, :7])[0]
        plain = exact(input_ids=tokens, attention_mask=mask)[0]
    first = both[:1] if task == "classifier" else both[:1, :7]
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    kept = slice(None) if task == "classifier" else mask.bool()
    assert 0 < (both[kept] - plain[kept]).norm() < (0.02 if spec == "int8" else 0.3) * plain[kept].norm()
    model.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        again = TASKS[task].from_pretrained(tmp_path / "packed")(input_ids=tokens, attention_mask=mask)[0]
    assert torch.equal(again, both)
