"""What a run has written, in the forms in which tests compare it: as bytes, and as what a loaded model says."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from whit.pipeline.job import open_source


def result(folder: Path) -> dict[str, bytes]:
    """Everything but whit.json, which holds times."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "whit.json"}


def weight_bytes(folder: Path) -> dict[str, bytes]:
    """The files of weights alone."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def floats(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter as a reader finds it, dequantized."""
    source = open_source(folder)
    return {name: source.read(name) for name in source.origins}


def logits(folder: Path) -> torch.Tensor:
    """(4, 32, vocabulary) float32, of tokens that are always the same."""
    tokens = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def difference(folder: Path, model: Path) -> float:
    """How far the logits of `folder` are from those of `model`, relative to these."""
    exact = logits(model)
    return float((logits(folder) - exact).norm() / exact.norm())
