"""File to file: what can be carried over is, bit for bit; what cannot is said and done only with --requantize."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import whit
from whit.errors import FormatError, RecipeError
from whit.formats import parse_format
from whit.pipeline import run
from whit.pipeline.job import Options, open_source, prepare
from whit.pipeline.sources import Coded
from whit.pipeline.transcode import prepare_transcode, recast, variants
from written import floats

ROUTES = {
    "int4-g32-f16": ("gptq", "mlx", "compressed-tensors", "gptq-v2", "awq", "gptq", "whit"),
    "int4-g32-asym-f16": ("awq", "gptq-v2", "compressed-tensors", "awq", "whit"),
    "int4-g32": ("compressed-tensors", "gptq", "awq", "compressed-tensors"),
    "int6-g32": ("mlx", "whit"),
    "int4-g64-asym-fz-f16": ("hqq", "whit", "hqq"),
    "int3-g32-f16": ("hqq", "gptq", "hqq"),
    "int4-g64-offset": ("mlx", "whit", "mlx"),
    "int3-g32-asym-f16": ("gptq-v2", "whit", "gptq-v2"),
    "int8-channel": ("compressed-tensors-int8", "compressed-tensors", "whit", "compressed-tensors-int8"),
    "nf4-dq": ("bitsandbytes", "whit", "bitsandbytes"),
    "fp4-g128": ("bitsandbytes", "whit"),
    "int8-absmax": ("bitsandbytes", "whit"),
    "int4-g32-f16-act": ("gptq", "whit", "gptq-v2", "gptq"),
    "int2-g32-asym-f16-act": ("gptq-v2", "whit", "gptq-v2"),
    "fp8": ("compressed-tensors", "whit", "compressed-tensors"),
}


def check_route(model: Path, format: str, route: tuple[str, ...], tmp_path: Path) -> None:
    keep = [("*down_proj", "bf16")] if "128" in format and "llama" in model.name else []
    whit.quantize(model, tmp_path / "0", whit.Recipe(rules=[("*", format), *keep]))
    expected = floats(tmp_path / "0")
    for step, export in enumerate(route):
        account = run(prepare_transcode(tmp_path / f"{step}", tmp_path / f"{step + 1}", export, Options()))
        assert account.export == export
        assert not any(entry.relative_error for entry in account.parameters)
        if export != "whit":
            assert account.decoded is not None
            assert account.decoded["largest_error"] == 0
        found = floats(tmp_path / f"{step + 1}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("format", [name for name in ROUTES if "128" not in name])
def test_lossless_routes(format: str, models: Path, tmp_path: Path):
    check_route(models / "llama-tied", format, ROUTES[format], tmp_path)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_experts_and_transposed_linears_travel_too(architecture: str, models: Path, tmp_path: Path):
    route = ("gptq", "compressed-tensors", "awq", "gptq") if architecture == "mixtral" else ("gptq", "whit", "gptq-v2")
    check_route(models / architecture, "int4-g32-f16", route, tmp_path)


def test_what_would_be_lost_is_said_and_needs_leave(models: Path, tmp_path: Path):
    whit.quantize(models / "llama-tied", tmp_path / "nf4", whit.Recipe(rules=[("*", "nf4")]))
    with pytest.raises(RecipeError) as caught:
        prepare_transcode(tmp_path / "nf4", tmp_path / "out", "gptq", Options())
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    said = "model.layers.*.self_attn.q_proj and 6 others (14 modules): nf4: gptq holds affine integers"
    assert lines[0].startswith(said)
    assert lines[0].endswith("add --requantize --format SPEC to round them again")
    int4 = whit.Recipe(rules=[("*", "int4-g32")])
    with pytest.raises(RecipeError, match="nf4 to int4-g32-f16"):
        prepare_transcode(tmp_path / "nf4", tmp_path / "out", "gptq", Options(), int4)
    account = run(prepare_transcode(tmp_path / "nf4", tmp_path / "out", "gptq", Options(), int4, requantize=True))
    errors = [entry.relative_error for entry in account.parameters if entry.status == "quantized"]
    assert len(errors) == 14
    assert all(0.03 < error < 0.2 for error in errors if error is not None)


def test_asymmetric_codes_do_not_fit_version_1(models: Path, tmp_path: Path):
    whit.quantize(models / "llama-tied", tmp_path / "awq", whit.Recipe(rules=[("*", "int4-g32-asym")]), export="awq")
    with pytest.raises(RecipeError, match="use --export gptq-v2"):
        prepare_transcode(tmp_path / "awq", tmp_path / "out", "gptq", Options())


def test_a_model_that_is_not_quantized_needs_a_format(models: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="not quantized; a gptq file needs a format"):
        prepare_transcode(models / "llama-tied", tmp_path / "out", "gptq", Options())


def test_sources_say_what_is_behind_a_parameter(models: Path, tmp_path: Path):
    whit.quantize(models / "mixtral", tmp_path / "gptq", whit.Recipe(rules=[("*", "int4-g32")]), export="gptq")
    source = open_source(tmp_path / "gptq")
    assert isinstance(source, Coded)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert str(source.format(experts)) == "int4-g32-f16"
    assert torch.equal(source.quantized(experts).dequantize(), source.read(experts))
    assert source.format("lm_head.weight") is None
    assert not isinstance(open_source(models / "mixtral"), Coded)


@pytest.mark.parametrize(
    ("spec", "ggml"), [("int4-g64-f16", "q4_0"), ("int4-g32", "q4_0"), ("int5-g32-f16", "q5_0"), ("int8-g96", "q8_0")]
)
def test_symmetric_groups_are_ggmls_plain_types(spec: str, ggml: str):
    value = whit.quantize_tensor(torch.randn(8, 192, generator=torch.Generator().manual_seed(0)), spec)
    there = recast(value, parse_format(ggml), "here")
    assert str(there.format) == ggml
    assert parse_format(ggml) in variants(value.format)
    assert torch.equal(there.dequantize(), value.dequantize())
    back = recast(there, parse_format(f"int{ggml[1]}-g32-f16"), "here")
    assert back.format in variants(there.format)
    assert torch.equal(back.dequantize(), value.dequantize())


def test_a_scale_that_would_be_rounded_is_an_error():
    value = whit.quantize_tensor(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), "int4-g32-f32")
    with pytest.raises(FormatError, match="here: a scale has no float16"):
        recast(value, parse_format("int4-g32-f16"), "here")


def test_rounding_what_was_rounded_is_said(models: Path, tmp_path: Path):
    int4 = whit.Recipe(rules=[("*", "int4-g32")])
    whit.quantize(models / "llama-tied", tmp_path / "gptq", int4, export="gptq")
    job = prepare(tmp_path / "gptq", tmp_path / "out", whit.Recipe(rules=[("*", "int8")]), Options())
    assert "quantized already, and rounded again here" in job.notes[0]
    assert not prepare(models / "llama-tied", tmp_path / "out", int4, Options()).notes


@pytest.mark.parametrize(
    ("spec", "how", "export", "said"),
    [
        ("int8", "int8", "compressed-tensors-int8", None),
        ("fp8", "fp8", "compressed-tensors", None),
        ("int8-absmax", "int8-outliers4.5", "bitsandbytes", None),
        ("int4-g32", "int8-g32", "whit", None),
        ("int4-g32-f16", "int8-g32", "gptq", "say nothing of activations"),
    ],
)
def test_how_inputs_are_quantized_travels_too(
    spec: str, how: str, export: str, said: str | None, models: Path, tmp_path: Path
):
    whit.quantize(models / "llama-tied", tmp_path / "0", whit.Recipe(rules=[("*", spec)], activations=how))
    job = prepare_transcode(tmp_path / "0", tmp_path / "1", export, Options())
    account = run(job)
    found = {entry.activations for entry in account.parameters if entry.status == "quantized"}
    assert found == ({how} if said is None else {None})
    assert (said is None) == (not job.notes)
    assert said is None or (said in job.notes[0] and "left behind" in job.notes[0])
    if export == "bitsandbytes":
        config = json.loads((tmp_path / "1" / "config.json").read_text())["quantization_config"]
        assert config["llm_int8_threshold"] == 4.5


def test_static_ranges_are_left_behind_and_said(tmp_path: Path):
    recipe = whit.Recipe(rules=[("*", "int8")], activations="int8-static")
    calibration = whit.Calibration("whit:text", samples=1, context=32)
    whit.quantize("whit:model", tmp_path / "0", recipe, calibration=calibration)
    job = prepare_transcode(tmp_path / "0", tmp_path / "1", "compressed-tensors", Options())
    assert "came from calibration" in job.notes[0]
