"""What cannot be fine-tuned is said in one sentence, before a weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from small_tuning import TUNING
from typer.testing import CliRunner

import whit
from whit.cli import build_app
from whit.errors import TrainingError
from whit.tuning import prepare_tuning

from tiny_models import save_speaking


@pytest.mark.slow
def test_experts_are_refused_as_targets_and_trained_around(data, tmp_path):
    folder = save_speaking(tmp_path / "moe", "qwen3_moe")
    tuning = replace(TUNING, format="int4-g32", steps=2)
    with pytest.raises(TrainingError, match=r"experts.* holds the matrices of all experts in one .* --target q_proj"):
        whit.finetune(folder, data, tmp_path / "out", tuning)
    record = whit.finetune(folder, data, tmp_path / "out", replace(tuning, targets=("q_proj", "v_proj")))
    assert record["held_out_loss"]["last"] < record["held_out_loss"]["first"]


def test_a_gguf_file_is_no_base(data, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(TrainingError, match=r"model.gguf: is one file; .* whit convert \S+ FOLDER --export whit$"):
        whit.finetune(tmp_path / "model.gguf", data, tmp_path / "out", TUNING)


def test_what_a_base_of_its_own_cannot_take_along_is_said_before_the_work(model, data, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "vocab.json").symlink_to(data)
    with pytest.raises(whit.WhitError, match="outside of the model"):
        prepare_tuning(folder, data, tmp_path / "out", replace(TUNING, method="gptq"), None, whit.Options())


def test_an_out_that_holds_something_else_is_said_before_the_estimate(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep me")
    words = ["finetune", str(model), str(data), str(tmp_path / "out"), "--context", "64", "--device", "cpu"]
    result = CliRunner().invoke(build_app(), words)
    assert "was not written by whit" in str(result.exception)
    assert "of memory" not in result.output
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


WRONG: tuple[tuple[Callable[[], Any], str], ...] = (
    (lambda: whit.Tuning(rank=0), "rank 0: must be at least 1"),
    (lambda: whit.Tuning(learning_rate=0.0), "learning-rate 0.0: must be above 0"),
    (lambda: whit.Tuning(dropout=1.0), "dropout 1.0: must lie in"),
    (lambda: whit.Tuning(optimizer="sgd"), "optimizer 'sgd': not known; must be one of adamw"),
    (lambda: whit.Tuning("int99"), "int99"),
    (lambda: whit.Tuning(init="loftq"), "init: nothing is quantized here"),
    (lambda: whit.Tuning("nf4", init="best"), "init 'best': not known; must be one of default, data, loftq"),
    (lambda: whit.Tuning(targets=("all-linear", "q_proj")), "targets"),
)


@pytest.mark.parametrize(("make", "reason"), WRONG)
def test_wrong_settings_are_said(make, reason):
    with pytest.raises(whit.WhitError, match=reason):
        make()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"targets": ("q_proj", "nothing")}, "target nothing: matches no linear .* there are q_proj,k_proj"),
        ({"context": 4096}, "context 4096: the model was built for 64 positions"),
        ({"learning_rate": 1e30}, "both must be finite; use a lower --learning-rate"),
    ],
)
def test_what_cannot_be_trained_is_said(model, data, tmp_path, change, reason):
    with pytest.raises(TrainingError, match=reason):
        whit.finetune(model, data, tmp_path / "out", replace(TUNING, **change))
    begun = [".out.partial"] if "learning_rate" in change else []  # that one took a step, and saved it
    assert [path.name for path in tmp_path.iterdir()] == begun
