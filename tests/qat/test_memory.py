"""The peak memory of block-wise training is one block with its optimizer, however many blocks a model has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import whit
from forking import in_child
from tiny_text import write_words
from whit.pipeline.job import prepare

WEIGHTS = 4 * 256 * 256 + 3 * 256 * 1024  # of a block
LONG = 14  # blocks


def save(folder: Path, blocks: int) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=blocks, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_tokenizers")
def test_the_peak_is_one_block(tmp_path: Path):
    """Twelve more blocks add what their file takes at most, none of the 64 bytes a weight that training takes."""
    text = write_words(tmp_path, (i % 125 + 3 for i in range(4000)))
    method = whit.Blocks(start=whit.RTN(), steps=2, batch=2, checks=1)
    recipe, calibration = whit.Recipe(method, [("*", "int2-g32")]), whit.Calibration(text, samples=2, context=32)
    peaks = {}
    for blocks in (2, LONG):
        model = save(tmp_path / f"m{blocks}", blocks)

        def train(model: Path = model, blocks: int = blocks) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins here
            whit.quantize(model, tmp_path / f"q{blocks}", recipe, calibration=calibration)
            status = Path("/proc/self/status").read_text()
            (tmp_path / f"{blocks}.txt").write_text(re.search(r"VmHWM:\s*(\d+) kB", status)[1])

        assert in_child(train) == 0
        peaks[blocks] = int((tmp_path / f"{blocks}.txt").read_text()) << 10
    more = (LONG - 2) * WEIGHTS
    assert peaks[LONG] - peaks[2] < 4 * more  # a quarter of what one optimizer's averages and masters of all would be
    job = prepare(tmp_path / f"m{LONG}", tmp_path / "none", recipe, whit.Options(), calibration)
    assert whit.pipeline.estimate.estimate(job).memory_bytes > method.weight_bytes * WEIGHTS
