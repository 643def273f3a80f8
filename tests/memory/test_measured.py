"""Predicted peak memory of loading and generating is within 10 % of what a process of its own is measured to take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import memory_peak


@pytest.mark.slow
def test_predicted_peaks_are_within_ten_per_cent(tmp_path: Path):
    config = hf.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for spec in ("bf16", "int8", "nf4-dq", "int4-g64"):
        # The kernel maps a freshly written file by pages of 4 KiB or 2 MiB, as it likes: the same process takes 630 or
        # 677 MB. The least of three is what it needs.
        rows = [memory_peak.compare(str(tmp_path / "model"), spec, tmp_path)]
        while not close(rows) and len(rows) < 3:
            rows.append(memory_peak.compare(str(tmp_path / "model"), spec, tmp_path))
        assert close(rows), rows


def close(rows: list[dict[str, float]]) -> bool:
    """Of all that a process takes, and of what the model takes above one that has imported the libraries."""
    row = min(rows, key=lambda row: row["peak"])
    above = (row["predicted"] - row["base"]) / (row["peak"] - row["base"])
    return 0.9 < row["predicted"] / row["peak"] < 1.1 and 0.9 < above < 1.1
