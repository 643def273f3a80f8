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
def test_what_training_adapters_will_take_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
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
    wanted += ["--format", "nf4-dq", "--context", "512", "--batch", "1", "--device", "cpu", "--json"]
    plan, record = (json.loads(subprocess.check_output([*wanted, *more])) for more in (["--dry-run"], []))
    assert 0.85 < plan["total_bytes"] / record["peak_memory_bytes"] < 1.15
