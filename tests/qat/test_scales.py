"""Repair: scales are trained, codes stay, and the file is of the kind that it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import whit
from whit.errors import RecipeError
from whit.qat import Course, Setting, Words, prepare_scales, train

TOKENS = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(0))

WORDS = Words(tokens=TOKENS)


@pytest.mark.parametrize(
    ("export", "spec"),
    [
        pytest.param("whit", "int2-g32-f16", marks=pytest.mark.slow),
        ("gptq", "int2-g32-f16"),
        ("gptq", "int3-g32-f16-act"),
    ],
)
def test_repair_moves_scales_and_no_code(export: str, spec: str, model: Path, tmp_path: Path):
    """Of a checkpoint of another kind too: imported, its scales trained, and written as what it was."""
    whit.quantize(model, tmp_path / "bad", whit.Recipe("rtn", [("*", spec)]), export=export)
    losses: list[float] = []
    course = Course(steps=15, batch=8, scale_rate=0.05)
    training = prepare_scales(tmp_path / "bad", tmp_path / "good", course, WORDS, Setting(teacher=model, export=export))
    train(training, lambda what, step, total, loss: losses.append(loss))
    assert losses[-1] < 0.95 * losses[0]
    old, new = (whit.pipeline.job.open_source(tmp_path / name) for name in ("bad", "good"))
    moved = 0
    for item in training.job.plan.items:
        if item.format is not None:
            a, b = old.quantized(item.name), new.quantized(item.name)
            assert a.format == b.format
            assert torch.equal(a.codes, b.codes)
            moved += not torch.equal(a.params["scale"], b.params["scale"])
    assert moved > 10


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "export"), [("int4-g32-asym-f16", "awq"), ("q4_0", "gguf")])
def test_repair_of_files_that_other_programs_read(spec: str, export: str, tmp_path: Path):
    """A file for AutoAWQ, or one for llama.cpp: the codes stay, scales are trained, and it is such a file again."""
    suffix = ".gguf" if export == "gguf" else ""
    bad, good = tmp_path / f"bad{suffix}", tmp_path / f"good{suffix}"
    whit.quantize("whit:model", bad, whit.Recipe("rtn", [("*", spec)]), export=export)
    course, words = Course(steps=3, batch=2, scale_rate=0.05), Words(windows=6, context=64)
    training = prepare_scales(bad, good, course, words, Setting(teacher="whit:model", export=export))
    train(training)
    old, new = whit.pipeline.job.open_source(bad), whit.pipeline.job.open_source(good)
    item = next(item for item in training.job.plan.items if item.format is not None)
    a, b = old.quantized(item.name), new.quantized(item.name)
    assert torch.equal(a.codes, b.codes)
    assert not torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.slow
def test_scales_without_a_teacher_learn_from_the_text(model: Path, tmp_path: Path):
    whit.quantize(model, tmp_path / "bad", whit.Recipe("rtn", [("*", "int2-g32")]))
    training = prepare_scales(tmp_path / "bad", tmp_path / "good", Course(steps=10, batch=8), WORDS)
    losses: list[float] = []
    train(training, lambda what, step, total, loss: losses.append(loss))
    assert losses[-1] < losses[0]
    with pytest.raises(RecipeError, match="not quantized"):
        prepare_scales(model, tmp_path / "none", Course())
    with pytest.raises(RecipeError, match="teacher"):
        prepare_scales(tmp_path / "bad", tmp_path / "none", Course(), Words("self"))
