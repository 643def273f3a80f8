"""No byte of a calibrated checkpoint depends on threads, on where the run was stopped, or on blocks read ahead."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from calibrated_runs import RULES, checkpoint, run

import whit
from stopping import stop_and_go_on
from whit import GPTQ, Calibration, Recipe, Refine
from whit.model.source import ModelSource
from whit.pipeline import quantize
from whit.pipeline.feed import BlockReader
from written import result

pytestmark = pytest.mark.usefixtures("tiny_tokenizers")


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_blocks_read_ahead_are_the_same(architecture: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: the next block is read by another thread while this one is worked on."""
    model = checkpoint(tmp_path / "model", architecture)
    run(model, tmp_path / "out", text)
    read, expected, others = ModelSource.read, [], []

    def noted(source: ModelSource, name: str) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            others.append(name)
        return read(source, name)

    def expect(reader: BlockReader, names: list[str]) -> None:
        expected.append(names)
        begin(reader, names)

    begin = BlockReader.expect
    monkeypatch.setattr(ModelSource, "read", noted)
    monkeypatch.setattr(BlockReader, "expect", expect)
    monkeypatch.setattr("whit.pipeline.feed.blocks.reads_ahead", lambda job: True)
    run(model, tmp_path / "ahead", text)
    assert result(tmp_path / "ahead") == result(tmp_path / "out")
    assert [bool(names) for names in expected] == [True]  # the second block's; nothing is behind it
    assert all(others.count(name) == 1 for name in expected[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stopped_run_ends_with_the_same_bytes_on_other_threads(
    architecture: str, dtype: torch.dtype, text: Path, tmp_path: Path
):
    model = checkpoint(tmp_path / "model", architecture, dtype)
    run(model, tmp_path / "whole", text)

    stop_and_go_on(partial(run, model, tmp_path / "parts", text), threads=(1, 2))
    assert result(tmp_path / "parts") == result(tmp_path / "whole")
    losses = [
        [e["proxy_loss"] for e in json.loads((tmp_path / name / "whit.json").read_text())["parameters"]]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_another_text_is_another_run(text: Path, tmp_path: Path):
    model = checkpoint(tmp_path / "model", "llama")
    run(model, tmp_path / "out", text)
    with pytest.raises(whit.WhitError, match="another model, recipe"):
        quantize(model, tmp_path / "out", Recipe(GPTQ(), RULES), calibration=Calibration(text, 4, 16))


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_asymmetric_calibration_resumes_with_the_same_bytes(architecture: str, text: Path, tmp_path: Path):
    model, recipe = checkpoint(tmp_path / "model", architecture), Recipe(GPTQ(asymmetric=0.5), [("*", "int3-g32")])
    run(model, tmp_path / "whole", text, recipe)
    run(model, tmp_path / "plain", text, Recipe(GPTQ(), [("*", "int3-g32")]))

    stop_and_go_on(partial(run, model, tmp_path / "parts", text, recipe))
    assert result(tmp_path / "parts") == result(tmp_path / "whole") != result(tmp_path / "plain")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_refinement_resumes_with_the_same_bytes_on_other_threads(architecture: str, text: Path, tmp_path: Path):
    method = Refine(steps=6, batch=8, rate=0.01)
    model, recipe = checkpoint(tmp_path / "model", architecture), Recipe(method, [("*", "int3-g32")])
    run(model, tmp_path / "start", text, Recipe(method.start, [("*", "int3-g32")]))
    account = run(model, tmp_path / "whole", text, recipe)
    assert all(entry.proxy_loss for entry in account.parameters if entry.status == "quantized")

    stop_and_go_on(partial(run, model, tmp_path / "parts", text, recipe), threads=(3, 1))
    assert result(tmp_path / "parts") == result(tmp_path / "whole") != result(tmp_path / "start")
