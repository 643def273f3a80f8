"""whit through its Python API, given the very tokens that the peers see."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import whit
from adapters import Job, Took, Weights, timed
from whit.calibration import CalibrationTokens
from whit.pipeline import dequantize


class _Given:
    """Stands where a Calibration does: the tokens were drawn before."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens

    def tokens(self, tokenizer: Any, max_context: int | None = None) -> CalibrationTokens:
        """As Calibration.tokens."""
        return CalibrationTokens.of(self._tokens)


def quantize(job: Job) -> tuple[Weights, Took]:
    """Quantize to a folder, and read it back in bfloat16; `suffix` is added to the row's format."""
    method = dict(job.options)
    asked = {key: method.pop(key) for key in ("transform",) if key in method}
    rules = [{"match": "*", "format": f"{job.row}{method.pop('suffix', '')}"}]
    recipe = whit.Recipe.from_dict({"method": method, "rules": rules, **asked})
    calibration: Any = _Given(job.tokens) if recipe.needs_stats else None
    with tempfile.TemporaryDirectory() as scratch:
        packed, plain = Path(scratch, "packed"), Path(scratch, "plain")
        options = whit.Options(seed=job.seed, device=job.device)
        _, took = timed(lambda: whit.quantize(job.model, packed, recipe, calibration=calibration, options=options))
        dequantize(packed, plain)
        weights: Weights = {}
        for file in sorted(plain.glob("*.safetensors")):
            weights |= load_file(file)
    return weights, took


def version() -> str:
    """What ran."""
    return whit.__version__
