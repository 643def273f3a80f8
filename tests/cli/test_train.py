"""`whit train`: each way of training from the command line, without data, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import whit
from tiny_text import word_tokenizer
from whit.cli import build_app
from whit.errors import OutputError, RecipeError, UnsupportedModelError, WhitError

from tiny_models import save_tiny

SHORT = ("--text", "self", "--context", "16", "--steps", "3", "--batch", "2", "--windows", "4", "--start", "rtn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("train") / "model", "llama")


def refused(*words: object) -> str:
    """What is said of wrong usage, on one line."""
    result = CliRunner().invoke(build_app(), ["train", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.replace("│", " ").split())


def train(*words: object) -> dict[str, object]:
    result = CliRunner().invoke(build_app(), ["train", *map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_full_and_then_scales(model: Path, tmp_path: Path):
    full = train(model, tmp_path / "full", "--format", "int2-g32", "--qat", "full", *SHORT)
    assert full["training"]["mode"] == "full"
    assert full["recipe"]["rules"] == [{"match": "*", "format": "int2-g32"}]
    scales = train(tmp_path / "full", tmp_path / "scales", "--teacher", model, *SHORT[:-2])
    assert scales["training"]["mode"] == "scales"
    assert scales["training"]["course"]["distill"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "scales"]


def test_both_phases_are_one_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the unquantized model, to its account; finished, it is known again, and nothing is trained a second time."""
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: word_tokenizer())
    words = [model, tmp_path / "out", "--qat", "scales", "--samples", "4", *SHORT]
    account = train(*words, "--format", "int3-g32")
    assert account["source"]["model"] == "model"
    assert account["recipe"]["method"]["name"] == "blocks"
    assert account["calibration"]["samples"] == 4
    assert account["training"]["mode"] == "scales"
    errors = [entry["relative_error"] for entry in account["parameters"] if entry["status"] == "quantized"]
    assert min(errors) > 0.05  # from the unquantized weights, not from the first phase's
    monkeypatch.setattr("whit.cli.trained.run", lambda job: pytest.fail("trained again"))
    assert train(*words, "--format", "int3-g32") == account
    with pytest.raises(OutputError, match="holds the result of another"):
        CliRunner().invoke(build_app(), ["train", *map(str, words), "--format", "int4-g32"], catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_cost_comes_first(model: Path, tmp_path: Path):
    words = ["train", str(model), str(tmp_path / "out"), "--format", "int2-g32", *SHORT, "--dry-run"]
    result = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    assert "3 steps of 2 windows, 96 tokens in all" in result.stderr
    assert re.search(r"in all; about \d+ s and [\d.]+ [MG]B of memory on cpu", result.stderr)
    assert not any(tmp_path.iterdir())


def test_the_cost_of_both_phases_comes_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: word_tokenizer())
    words = ["train", str(model), str(tmp_path / "out"), "--format", "int2-g32", "--qat", "scales", "--samples", "4"]
    result = CliRunner().invoke(build_app(), [*words, *SHORT, "--dry-run", "--json"], catch_exceptions=False)
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["the", "blocks:", "then"]  # its own text, blocks, scales
    assert all(re.search(r"about \d+ s", line) for line in lines)
    assert json.loads(result.stdout)["estimate"]["seconds"] > 0
    assert not any(tmp_path.iterdir())


def test_what_does_not_go_together(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: word_tokenizer())
    whit.quantize(model, tmp_path / "q", whit.Recipe("rtn", [("*", "int4-g32")]))
    for words, said in (
        ([model, tmp_path / "out"], "add --format"),
        ([tmp_path / "q", tmp_path / "out", "--format", "int4-g32"], "drop --format"),
        ([tmp_path / "q", tmp_path / "out", "--qat", "full"], "--qat scales"),
        ([tmp_path / "q", tmp_path / "out", "--text", "self"], "name --teacher"),
        ([model, tmp_path / "out", "--qat", "scales", "--format", "mxfp4"], "no gradient can move the scales of mxfp4"),
        ([model, tmp_path / "out", "--qat", "blocks", "--format", "w8a8"], "rounded in full training only"),
    ):
        with pytest.raises(RecipeError, match=said):
            CliRunner().invoke(build_app(), ["train", *map(str, words)], catch_exceptions=False)


def test_what_would_change_nothing_is_refused(model: Path, tmp_path: Path):
    whit.quantize(model, tmp_path / "q", whit.Recipe("rtn", [("*", "int4-g32")]))
    out = tmp_path / "out"
    for words, said in (
        ((model, out, "--format", "int2-g32", "--qat", "blocks", "--hidden", "1"), "--hidden: has no effect"),
        ((model, out, "--format", "int2-g32", "--qat", "blocks", "--kept-rate", "0.1"), "--kept-rate: has no effect"),
        ((tmp_path / "q", out, "--teacher", model, "--rate", "1"), "--rate: has no effect with --qat scales of a"),
        ((tmp_path / "q", out, "--teacher", model, "--start", "rtn"), "--start: has no effect"),
        ((model, out, "--format", "int2-g32-asym", "--qat", "full", "--recipe", "efficientqat"), "use --qat scales"),
    ):
        assert said in refused(*words)
    assert not out.exists()


def test_efficientqat_is_both_of_its_phases(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: word_tokenizer())
    words = [model, tmp_path / "out", "--recipe", "efficientqat", "--format", "int2-g32-asym", "--samples", "4"]
    account = train(*words, "--text", "self", "--context", "16", "--steps", "2", "--windows", "4", "--batch", "2")
    assert account["training"]["mode"] == "scales"
    course, method = account["training"]["course"], account["recipe"]["method"]
    assert (method["name"], method["start"]["name"], method["rate"]) == ("blocks", "rtn", 2e-5)
    assert (course["text"], course["distill"], course["scale_rate"], course["at_once"]) == (1.0, 0.0, 2e-5, 2)


def test_what_the_second_phase_wants_is_there_before_the_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Text, teacher and start are looked at before anything is done."""
    monkeypatch.setattr(whit.pipeline.job, "load_tokenizer", lambda *_, **__: word_tokenizer())
    monkeypatch.setattr(whit.qat.job, "load_tokenizer", lambda *_, **__: word_tokenizer())
    other = save_tiny(tmp_path / "other", "gpt2")
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    out, both, full = tmp_path / "out", ("--qat", "scales", "--samples", "2"), ("--qat", "full", "--start", "rtn")
    for words, said in (
        ((*full, "--text", tmp_path / "short.txt"), "3 tokens; a sample has 64"),
        ((*both, "--teacher", tmp_path / "none"), "no such folder"),
        ((*both, "--teacher", "whit:model"), "its vocab_size is 8192, MODEL's 128"),
        (("--qat", "full", "--start", other), "holds no model that whit has quantized"),
    ):
        command = ["train", str(model), str(out), "--format", "int4-g32", *map(str, words)]
        with pytest.raises(WhitError, match=said):
            CliRunner().invoke(build_app(), command, catch_exceptions=False)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "short.txt"}
    t5 = save_tiny(tmp_path / "t5", "t5")
    command = ["train", str(t5), str(out), "--format", "int4-g32", *SHORT]
    with pytest.raises(UnsupportedModelError, match="models of one text"):
        CliRunner().invoke(build_app(), command, catch_exceptions=False)
