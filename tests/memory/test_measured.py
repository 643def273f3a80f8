"""Predicted peaks of memory are near what a process of its own is measured to take: loading, generating, training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import memory_peak

LOADS = """
import sys, whit
from whit.integrations.loading import load_causal_lm
from whit.process import process_memory
from transformers import LlamaForCausalLM
before = process_memory("RssFile")
model = load_causal_lm(sys.argv[1], device="cpu", quantization=whit.QuantizationConfig("nf4"))
print(process_memory("RssFile") - before)
"""


@pytest.mark.slow
def test_predicted_peaks_are_within_ten_per_cent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = hf.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    # glibc keeps what it guesses will be asked for again: the same process takes 180 or 211 MB above its imports, by
    # chance. Given back at once, which a fixed threshold asks for, they agree to 1 MB from run to run.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    for spec in ("bf16", "int8", "nf4-dq", "int4-g64"):
        row = memory_peak.compare(str(tmp_path / "model"), spec, tmp_path)
        above = (row["predicted"] - row["base"]) / (row["peak"] - row["base"])
        assert 0.9 < row["predicted"] / row["peak"] < 1.1, row
        assert 0.9 < above < 1.1, row


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["nf4-dq", "int8", "int4-g64"])
def test_what_training_adapters_will_take_is_said(spec: str, tmp_path: Path):
    """To a tenth or so, scores included; where freed memory lies moves the peak itself by some per cent."""
    answers = [
        {"prompt": f"What came {i}th? ", "response": "The moon, late, over the sea. " * (1 + i % 12)} for i in range(40)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, answers)))
    wanted = [
        sys.executable,
        "-m",
        "whit",
        "finetune",
        "whit:model",
        str(tmp_path / "data.jsonl"),
        str(tmp_path / "out"),
    ]
    wanted += ["--format", spec, "--context", "512", "--batch", "2", "--device", "cpu", "--json"]
    plan, record = (json.loads(subprocess.check_output([*wanted, *more])) for more in (["--dry-run"], []))
    assert 0.9 < plan["total_bytes"] / record["peak_memory_bytes"] < 1.12
    assert plan["scoring_bytes"] > 0


def test_pages_of_the_file_leave_memory_as_its_weights_are_quantized(tmp_path: Path):
    """They would count as the process's own until it ends: 269 MB of a model of 116."""
    config = hf.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=128
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    child = [sys.executable, "-c", LOADS, str(tmp_path / "model")]
    grown = int(subprocess.check_output(child, text=True).splitlines()[-1])
    assert size > 60e6
    assert grown < 0.3 * size
