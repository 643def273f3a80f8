"""`whit train`: each way of training from the command line, without data, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import whit
from test_calibrated import tokenizer
from whit.cli import build_app
from whit.errors import OutputError, RecipeError

from tiny_models import save_tiny

SHORT = ("--text", "self", "--context", "16", "--steps", "3", "--batch", "2", "--windows", "4", "--start", "rtn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("train") / "model", "llama")


def train(*words: object) -> dict[str, object]:
    result = CliRunner().invoke(build_app(), ["train", *map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_full_and_then_scales(model: Path, tmp_path: Path):
    full = train(model, tmp_path / "full", "--format", "int2-g32", "--qat", "full", *SHORT)
    assert full["training"]["mode"] == "full"
    assert full["recipe"]["rules"] == [{"match": "*", "format": "int2-g32"}]
    scales = train(tmp_path / "full", tmp_path / "scales", "--teacher", model, *SHORT)
    assert scales["training"]["mode"] == "scales"
    assert scales["training"]["course"]["distill"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "scales"]


def test_both_phases_are_one_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the unquantized model, to its account; finished, it is known again, and nothing is trained a second time."""
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: tokenizer())
    words = [model, tmp_path / "out", "--qat", "scales", "--samples", "4", *SHORT]
    account = train(*words, "--format", "int3-g32")
    assert account["source"]["model"] == "model"
    assert account["recipe"]["method"]["name"] == "blocks"
    assert account["calibration"]["samples"] == 4
    assert account["training"]["mode"] == "scales"
    errors = [entry["relative_error"] for entry in account["parameters"] if entry["status"] == "quantized"]
    assert min(errors) > 0.05  # from the unquantized weights, not from the first phase's
    monkeypatch.setattr("whit.cli.train.run", lambda job: pytest.fail("trained again"))
    assert train(*words, "--format", "int3-g32") == account
    with pytest.raises(OutputError, match="holds the result of another"):
        CliRunner().invoke(build_app(), ["train", *map(str, words), "--format", "int4-g32"], catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_cost_comes_first(model: Path, tmp_path: Path):
    words = ["train", str(model), str(tmp_path / "out"), "--format", "int2-g32", *SHORT, "--dry-run"]
    result = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    assert "3 steps of 2 windows, 96 tokens in all" in result.stderr
    assert re.search(r"in all; about \d+ s and [\d.]+ MB of memory on cpu", result.stderr)
    assert not any(tmp_path.iterdir())


def test_the_cost_of_both_phases_comes_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: tokenizer())
    words = ["train", str(model), str(tmp_path / "out"), "--format", "int2-g32", "--qat", "scales", "--samples", "4"]
    result = CliRunner().invoke(build_app(), [*words, *SHORT, "--dry-run", "--json"], catch_exceptions=False)
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["the", "blocks:", "then"]  # its own text, blocks, scales
    assert all(re.search(r"about \d+ s", line) for line in lines)
    assert json.loads(result.stdout)["estimate"]["seconds"] > 0
    assert not any(tmp_path.iterdir())


def test_what_does_not_go_together(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: tokenizer())
    whit.quantize(model, tmp_path / "q", whit.Recipe("rtn", [("*", "int4-g32")]))
    for words, said in (
        ([model, tmp_path / "out"], "add --format"),
        ([tmp_path / "q", tmp_path / "out", "--format", "int4-g32"], "drop --format"),
        ([tmp_path / "q", tmp_path / "out", "--qat", "full"], "--qat scales"),
        ([tmp_path / "q", tmp_path / "out", "--text", "self"], "name --teacher"),
        ([model, tmp_path / "out", "--qat", "scales", "--format", "mxfp4"], "no gradient can move them"),
        ([model, tmp_path / "out", "--qat", "blocks", "--format", "w8a8"], "rounded in full training only"),
    ):
        with pytest.raises(RecipeError, match=said):
            CliRunner().invoke(build_app(), ["train", *map(str, words)], catch_exceptions=False)
