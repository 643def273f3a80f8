"""Groups of columns of like activation: what they are, what they gain, and how GPTQ files hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import whit
from whit.calibration import Calibration
from whit.errors import FormatError, RecipeError
from whit.export import decoders
from whit.formats import parse_format
from whit.pipeline.job import Options, open_source
from whit.pipeline.sources import Coded
from whit.pipeline.transcode import prepare_transcode


def test_columns_that_matter_share_params_with_each_other(random: torch.Generator):
    format, weight = parse_format("int4-g32-act"), torch.randn(16, 96, generator=random)
    importance = torch.rand(96, generator=random)
    group = format.fit(weight, importance)["group"]
    assert group.shape == (1, 96)
    assert sorted(group[0].tolist()) == [g for g in range(3) for _ in range(32)]
    assert importance[group[0] == 0].min() > importance[group[0] == 1].max()
    params = format.fit(weight, importance)
    moved = weight[:, importance.argsort(descending=True)]  # the same groups, as neighbours
    plain = parse_format("int4-g32")
    best = whit.methods.Clip(19, 0.55).search(moved, plain, importance.sort(descending=True).values)
    assert torch.equal(params["scale"], best["scale"])


def test_outlying_columns_cost_the_others_less(random: torch.Generator):
    scale = torch.ones(256)
    scale[torch.randperm(256, generator=random)[:32]] = 8.0
    weight = torch.randn(32, 256, generator=random) * scale
    errors = [whit.error(weight, whit.quantize_tensor(weight, f"int4-g32{act}")).mse for act in ("", "-act")]
    assert errors[1] < 0.5 * errors[0]


def test_gptq_writes_its_index(tmp_path: Path):
    rules = [("*", "bf16"), ("model.layers.1.mlp.down_proj", "int4-g32-act")]
    recipe, calibration = whit.Recipe(whit.GPTQ(act_order=True), rules), Calibration(samples=2, context=64)
    account = whit.quantize("whit:model", tmp_path / "out", recipe, calibration=calibration, export="gptq")
    assert account.decoded is not None
    assert account.decoded["largest_error"] == 0
    assert json.loads((tmp_path / "out/quantize_config.json").read_text())["desc_act"] is True
    tensors, source = load_file(tmp_path / "out/model.safetensors"), open_source(tmp_path / "out")
    assert isinstance(source, Coded)
    module = "model.layers.1.mlp.down_proj"
    index = tensors[f"{module}.g_idx"]
    assert index.dtype == torch.int32
    assert bool((index.diff() < 0).any())
    assert set(index.bincount().tolist()) == {32}
    stored = {key: tensors[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    weight = decoders.gptq(**stored, bits=4, version=1)
    assert torch.equal(source.read(f"{module}.weight"), weight)
    assert str(source.format(f"{module}.weight")) == "int4-g32-f16-act"
    with pytest.raises(RecipeError, match="act-order: its groups are not runs of neighbouring columns"):
        prepare_transcode(tmp_path / "out", tmp_path / "awq", "awq", Options())


def test_what_makes_no_sense_is_said():
    with pytest.raises(FormatError, match="act-order needs groups"):
        parse_format("int4-act")
    with pytest.raises(FormatError, match="is not a format"):
        parse_format("nf4-act")
