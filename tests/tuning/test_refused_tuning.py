"""What cannot be fine-tuned is said in one sentence, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from small_tuning import TUNING

import whit
from whit.errors import TrainingError

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
