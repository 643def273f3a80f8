"""Killed at any moment: OUT is not there or is whole, and the next run ends with the same bytes."""

from __future__ import annotations

import os
import random as randomness
import shutil
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from forking import die_at_step, in_child
from whit import RTN, Calibration, Options, Recipe
from whit.checkpoint.work import WorkFolder
from whit.errors import OutputError, WhitWarning
from whit.pipeline import quantize
from whit.tensor import Format, LayerStats, QuantizedTensor
from written import result

from tiny_models import save_speaking, save_tiny

OPTIONS = Options(shard_size=40_000)
RULES = [("*", "nf4-dq"), ("lm_head", "int4-g32-asym")]


@dataclass(frozen=True)
class SlowRTN(RTN):
    """Round to nearest that takes its time, so that a kill falls between parameters."""

    def __call__(self, weight: torch.Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        time.sleep(0.02)
        return super().__call__(weight, stats, format)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("resume") / "model", "llama", torch.bfloat16, "50KB")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(model, out, Recipe(RTN(), RULES), options=OPTIONS)
    return result(out)


def kill_at_random(model: Path, out: Path, kills: int) -> int:
    """Kill `kills` runs at random moments, and more until one has left units for the next, then let one finish; how
    many of them left some. A run that was quicker than its killer is taken away."""
    recipe, seeds, useful, tries = Recipe(SlowRTN(), RULES), randomness.Random(0), 0, 0
    start = time.monotonic()
    assert in_child(lambda: quantize(model, out.with_name("timed"), recipe, options=OPTIONS)) == 0
    whole = time.monotonic() - start  # of a run that nobody kills, as busy as this machine is
    shutil.rmtree(out.with_name("timed"))
    while tries < kills or (not useful and tries < 100):
        tries += 1
        moment = seeds.uniform(0.05, 0.9) * whole
        status = in_child(lambda: quantize(model, out, recipe, options=OPTIONS), kill_after=moment)
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            shutil.rmtree(out)
            continue
        journal = out.parent / f".{out.name}.partial/journal.jsonl"
        useful += journal.exists() and journal.read_bytes().count(b"\n") > 1
    assert in_child(lambda: quantize(model, out, recipe, options=OPTIONS)) == 0
    return useful


def test_kills_at_random_moments(model: Path, undisturbed: dict[str, bytes], tmp_path: Path):
    assert kill_at_random(model, tmp_path / "out", 6) > 0
    assert result(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_twenty_kills_for_each_of_five_results(model: Path, undisturbed: dict[str, bytes], tmp_path: Path):
    for round in range(5):
        kill_at_random(model, tmp_path / str(round), 20)
        assert result(tmp_path / str(round)) == undisturbed


def kill_at_step(model: Path, out: Path, step: int, recipe: Recipe, options: Options = OPTIONS) -> int:
    def run() -> None:
        die_at_step(step)
        quantize(model, out, recipe, options=options)

    return in_child(run)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_before_any_change_to_a_file(stride: int, model: Path, undisturbed: dict[str, bytes], tmp_path: Path):
    recipe, step = Recipe(RTN(), RULES), 1
    while True:
        out = tmp_path / str(step)
        status = kill_at_step(model, out, step, recipe)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if out.exists():
            assert result(out) == undisturbed
        assert in_child(lambda out=out: quantize(model, out, recipe, options=OPTIONS)) == 0
        assert result(out) == undisturbed
        step += stride
    assert step > 60  # the run has that many steps, or nothing was tested
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_while_an_older_result_is_replaced(
    stride: int, model: Path, undisturbed: dict[str, bytes], tmp_path: Path
):
    recipe, restart = Recipe(RTN(), RULES), Options(shard_size=OPTIONS.shard_size, restart=True)
    quantize(model, tmp_path / "old", Recipe(rules=[("*", "int8")]), options=OPTIONS)
    old, step, status = result(tmp_path / "old"), 1, -1
    while status != 0:
        out = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", out)
        status = kill_at_step(model, out, step, recipe, restart)
        if out.exists():  # between two renames it may be gone, and the next run puts the new one there
            assert result(out) in (old, undisturbed)
        quantize(model, out, recipe, options=restart)
        assert result(out) == undisturbed
        assert not list(tmp_path.glob(".*"))
        step += stride


def test_a_torn_line_in_the_journal_is_dropped(model: Path, undisturbed: dict[str, bytes], tmp_path: Path):
    out, recipe = tmp_path / "out", Recipe(RTN(), RULES)
    assert kill_at_step(model, out, 75, recipe) == -signal.SIGKILL
    journal = tmp_path / ".out.partial/journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    quantize(model, out, recipe, options=OPTIONS)
    assert result(out) == undisturbed


@pytest.mark.parametrize("recipe", [Recipe(RTN(), RULES), Recipe("gptq", RULES)], ids=["rtn", "gptq"])
def test_what_stands_in_a_damaged_line_is_done_again(recipe: Recipe, tmp_path: Path):
    model = save_speaking(tmp_path / "model", dtype=torch.bfloat16)
    seen = Calibration("whit:text", samples=4, context=32) if recipe.needs_stats else None
    quantize(model, tmp_path / "undisturbed", recipe, calibration=seen)
    out, done = tmp_path / "out", list[str]()

    def killed(name: str, done: int, total: int) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(
        lambda: quantize(model, out, recipe, calibration=seen, options=Options(progress=killed))
    ) == -signal.SIGKILL  # fmt: skip
    journal = tmp_path / ".out.partial/journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b"model.layers.0" in line)
    number = lines[at].index(b'"seconds": ') + 11
    lines[at] = lines[at][:number] + b"7" + lines[at][number + 1 :]  # it is JSON as before, and untrue
    journal.write_bytes(b"".join(lines))
    with pytest.warns(WhitWarning, match=rf"damaged in line {at + 1}; what was done there is done again"):
        quantize(model, out, recipe, calibration=seen, options=Options(progress=lambda name, *_: done.append(name)))
    assert done[0] == "model.layers.0"
    assert "model.layers.1" not in done
    assert result(out) == result(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", [b"\xff", b"\n", b"7"])
def test_no_damage_to_a_journal_is_a_traceback(damage: bytes, tmp_path: Path):
    records = {f"unit {n}": {"entries": [{"name": "x", "error": 0.1 * n}], "seconds": n / 7} for n in range(3)}
    work = WorkFolder(tmp_path / "out", "fingerprint")
    work.write_file("weights", b"")
    for name, record in records.items():
        work.record(name, record)
    work.close()
    journal = tmp_path / ".out.partial/journal.jsonl"
    content = journal.read_bytes()
    first = content.index(b"\n")
    for place in range(len(content)):
        journal.write_bytes(content[:place] + damage + content[place + 1 :])
        if content[place : place + 1] == damage:
            continue
        if place <= first:
            with pytest.raises(OutputError, match=r"out: an unfinished run .* lies in .*; or pass --restart"):
                WorkFolder(tmp_path / "out", "fingerprint")
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work = WorkFolder(tmp_path / "out", "fingerprint")
        work.close()
        assert work.finished.items() <= records.items()
        assert len(work.finished) < 3
        assert said or place == len(content) - 1  # which is a torn last line


def test_finished_units_are_not_done_again(model: Path, tmp_path: Path):
    out, recipe, done = tmp_path / "out", Recipe(RTN(), RULES), []
    assert kill_at_step(model, out, 75, recipe) == -signal.SIGKILL
    finished = (tmp_path / ".out.partial/journal.jsonl").read_bytes().count(b"\n") - 1
    options = Options(shard_size=OPTIONS.shard_size, progress=lambda name, n, total: done.append((name, n, total)))
    account = quantize(model, out, recipe, options=options)
    assert [n for _, n, _ in done] == list(range(finished + 1, done[0][2] + 1))
    assert account.counts()["quantized"] == 15


def test_an_unfinished_run_of_another_recipe(model: Path, undisturbed: dict[str, bytes], tmp_path: Path):
    out, recipe = tmp_path / "out", Recipe(RTN(), RULES)
    assert kill_at_step(model, out, 75, Recipe(rules=[("*", "int8")])) == -signal.SIGKILL
    with pytest.raises(OutputError, match="unfinished run with another model, recipe or version"):
        quantize(model, out, recipe, options=OPTIONS)
    quantize(model, out, recipe, options=Options(shard_size=OPTIONS.shard_size, restart=True))
    assert result(out) == undisturbed


def test_what_wrote_nothing_yet_stands_in_no_ones_way(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as full:
        full.setattr("whit.checkpoint.places.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(OutputError, match="are needed and 0 are free"):
            quantize(model, out, Recipe(rules=[("*", "int8")]), options=OPTIONS)
    assert (tmp_path / ".out.partial/journal.jsonl").exists()
    quantize(model, out, Recipe(RTN(), RULES), options=OPTIONS)
    assert result(out) == undisturbed
