"""Small calibrated runs in several shards: 24 samples of 48 tokens, GPTQ in int4-g32 unless told otherwise."""

from __future__ import annotations

from pathlib import Path

import torch

from whit import GPTQ, Calibration, Options, Recipe
from whit.pipeline import quantize
from whit.pipeline.coverage import Account

from tiny_models import save_tiny

RULES = [("*", "int4-g32")]


def checkpoint(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
    return save_tiny(folder, architecture, dtype, "50KB")


def run(model: Path, out: Path, text: Path, recipe: Recipe | None = None, **options) -> Account:
    calibration = Calibration(text, samples=24, context=48)
    recipe = recipe or Recipe(GPTQ(), RULES)
    return quantize(model, out, recipe, calibration=calibration, options=Options(shard_size=40_000, **options))
