"""AWQ and SmoothQuant of whole checkpoints that read one text and write another."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
import transformers as hf
from torch import Tensor

from two_texts import MODELS, made
from whit import AWQ, Calibration, Options, Recipe, SmoothQuant
from whit.pipeline import quantize
from whit.pipeline.coverage import Account

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")

SALIENT = re.compile(r"(v_proj|\bv|final_layer_norm|encoder\S*layer\.1\.layer_norm|layer\.2\.layer_norm)\.weight$")
QUERIES = re.compile(r"(q_proj|\bq)\.weight$")


def run(model: Path, out: Path, text: Path, recipe: Recipe) -> Account:
    calibration = Calibration(text, samples=24, context=48) if recipe.transform else None
    return quantize(model, out, recipe, calibration=calibration, options=Options(shard_size=40_000))


@torch.no_grad()
def written(model: hf.PreTrainedModel) -> Tensor:
    tokens = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits
    return logits


def difference(architecture: str, out: Path, model: Path) -> float:
    ours, exact = (written(MODELS[architecture][0].from_pretrained(folder)) for folder in (out, model))
    return float((ours - exact).norm() / exact.norm())


def salient(architecture: str, folder: Path, factor: float) -> Path:
    """A checkpoint in which a few channels of values and of a feed-forward's input are `factor` times as large.

    Queries and keys stay small: where random ones decide which token is looked at, any rounding changes all.
    """
    model = made(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if SALIENT.search(name):
                parameter[[3, 30]] *= factor
            elif QUERIES.search(name):
                parameter *= 0.3
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("transform", [AWQ(steps=4), SmoothQuant(steps=4)])
@pytest.mark.parametrize("architecture", MODELS)
def test_models_are_rescaled_and_stay_what_they_are(architecture: str, transform, text: Path, tmp_path: Path):
    """At 8 bits the result writes what the model does, though its norms are others."""
    made(architecture).save_pretrained(tmp_path / "model")
    account = run(tmp_path / "model", tmp_path / "out", text, Recipe("rtn", [("*", "int8")], transform))
    assert any(f"rescaled by {transform.name}" in str(entry.reason) for entry in account.parameters)
    assert difference(architecture, tmp_path / "out", tmp_path / "model") < 0.05


@pytest.mark.parametrize(("transform", "format"), [("awq", "int4-g32"), ("smoothquant", "w8a8")])
def test_less_is_lost_where_channels_stand_out(transform: str, format: str, text: Path, tmp_path: Path):
    """By a tenth over all of them; where little is rescaled (BART) one model alone is within what rounding differs."""
    ratios = []
    for architecture in MODELS:
        path = salient(architecture, tmp_path / architecture, 8)
        for name in (None, transform):
            run(path, tmp_path / f"{architecture}-{name}", text, Recipe("rtn", [("*", format)], name))
        plain, ours = (difference(architecture, tmp_path / f"{architecture}-{n}", path) for n in (None, transform))
        ratios.append(ours / plain)
    assert geometric_mean(ratios) < 0.9
