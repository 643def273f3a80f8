"""Block inputs within a stated budget: in memory or in files, and the same bytes of a result."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

import whit
from tiny_text import random_words, word_tokenizer, write_words
from whit.calibration import Calibration
from whit.calibration.storage import Storage
from whit.cli import main
from whit.methods import GPTQ, Blocks, Refine
from whit.methods.base import Method
from whit.pipeline.estimate import estimate
from whit.pipeline.job import prepare

from tiny_models import save_tiny

CPU = torch.device("cpu")
SAMPLES, CONTEXT, HIDDEN = 3, 32, 64
INPUTS = SAMPLES * CONTEXT * HIDDEN * 4  # bytes of one copy
METHODS = (GPTQ(), Refine(steps=2, batch=2, checks=1), Blocks(steps=2, batch=2, checks=1, asymmetric=0.5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("storage") / "model", "llama")
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text"), random_words(2000, 3, seed=1))


def mapped_bytes() -> int:
    """Of block inputs that this process has in files."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "block-inputs-" in line]
    return sum(int(line.split()[0].split("-")[1], 16) - int(line.split("-")[0], 16) for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_byte_depends_on_where_inputs_lie(
    method: Method, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    call = GPTQ.__call__  # of the start, when a block and its inputs are there

    def watched(self: GPTQ, *arguments: object) -> whit.QuantizedTensor:
        seen.append(mapped_bytes())
        return call(self, *arguments)

    monkeypatch.setattr(GPTQ, "__call__", watched)
    copies = 1 + method.needs_exact
    found, calibration = [], Calibration(text, SAMPLES, CONTEXT)
    for memory in (copies * INPUTS, copies * INPUTS - 1):
        seen.clear()
        gc.collect()  # what an earlier run had
        options, out = whit.Options(input_memory=memory), tmp_path / str(memory)
        whit.quantize(model, out, whit.Recipe(method, [("*", "int3-g32")]), calibration=calibration, options=options)
        in_files = memory < copies * INPUTS
        assert {bool(number) for number in seen} == {in_files}
        assert not in_files or min(seen) >= copies * INPUTS
        assert not list(out.glob("*.tmp"))
        found.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert found[0]
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_estimate_follows_the_budget(
    method: Method, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("whit.pipeline.estimate.peak_memory", lambda: 0)
    inputs, memory = (1 + method.needs_exact) * INPUTS, []
    for budget in (inputs, inputs - 1):
        recipe = whit.Recipe(method, [("*", "int3-g32")])
        job = prepare(model, tmp_path / "out", recipe, whit.Options(input_memory=budget), Calibration(text, 3, CONTEXT))
        expected = estimate(job)
        assert expected.inputs_bytes == inputs
        memory.append(expected.memory_bytes)
    assert memory[0] - memory[1] == inputs


def command(*words: object) -> int:
    arguments, sys.argv = sys.argv, ["whit", *map(str, words)]
    try:
        main()
    except SystemExit as status:
        return int(status.code or 0)
    finally:
        sys.argv = arguments
    return 0


@pytest.mark.parametrize("start", [("quantize", "--method", "gptq"), ("train", "--qat", "blocks", "--steps", "2")])
def test_the_command_line_states_it(start: tuple[str, ...], model: Path, text: Path, tmp_path: Path, capfd):
    chosen = "--calibration" if start[0] == "quantize" else "--text"
    words = [start[0], model, tmp_path / "out", *start[1:], "--format", "int4-g32", "--context", CONTEXT]
    words += ["--samples", SAMPLES, chosen, text]
    inputs = INPUTS if start[0] == "quantize" else 2 * INPUTS
    assert command(*words, "--dry-run", "--input-memory", "24GB") == 0
    assert f"{inputs / 1000:.2f} kB of block inputs in memory" in capfd.readouterr().out
    assert command(*words, "--input-memory", "20kB") == 0
    assert "of block inputs in files until the end, more than --input-memory 20.00 kB" in capfd.readouterr().err
    for wrong in ("much", "-1GB", "0"):
        assert command(*words, f"--input-memory={wrong}") == 1
        said = capfd.readouterr().err
        assert f"size '{wrong}': is not an amount of memory" in said
        assert "Traceback" not in said


def test_a_budget_is_no_negative_number():
    with pytest.raises(whit.WhitError, match="input memory -1: is not an amount of memory"):
        whit.Options(input_memory=-1)


def test_a_disk_without_room_is_said(tmp_path: Path):
    with pytest.raises(whit.WhitError, match=r"more than 0 bytes go to the disk, .* are free; .* --input-memory"):
        Storage(tmp_path, 0).empty((1 << 20, 1 << 20, 1 << 10), torch.float32, CPU, 2)
    assert not any(tmp_path.iterdir())
