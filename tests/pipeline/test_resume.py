"""Killed at any moment or out of disk: OUT is not there or is whole, and the next run ends with the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import random as randomness
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from forking import die_at_step, in_child
from whit import RTN, Options, Recipe
from whit.errors import OutputError, WhitWarning
from whit.pipeline import quantize
from whit.tensor import Format, LayerStats, QuantizedTensor
from written import result

from tiny_models import save_tiny

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


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "/proc/out"])
def test_a_place_where_nothing_can_be_written_is_said(place: str, model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out: cannot be made \(.+\); it must lie where you can write"):
        quantize(model, tmp_path / place, Recipe(RTN(), RULES), options=OPTIONS)


def test_two_runs_do_not_write_the_same_folder(model: Path, tmp_path: Path):
    out, errors = tmp_path / "out", []

    def progress(*_: object) -> None:
        with pytest.raises(OutputError, match="another run is writing it") as caught:
            quantize(model, out, Recipe(RTN(), RULES), options=OPTIONS)
        errors.append(caught.value)

    quantize(model, out, Recipe(RTN(), RULES), options=Options(shard_size=OPTIONS.shard_size, progress=progress))
    assert errors


@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate", "fdatasync", "write"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    function: str, model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original, calls = getattr(os, function), []

    def full(*args: int) -> int:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(original(*args) or 0)

    out, recipe = tmp_path / "out", Recipe(RTN(), RULES)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OutputError, match=r"no space left on device; .* run the same command again") as caught:
            quantize(model, out, recipe, options=OPTIONS)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    quantize(model, out, recipe, options=OPTIONS)
    assert result(out) == undisturbed


def test_a_limit_on_file_size(model: Path, tmp_path: Path):
    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(OutputError, match="file too large"):
            quantize(model, tmp_path / "out", Recipe(RTN(), RULES), options=OPTIONS)

    assert in_child(run) == 0
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"bytes are needed and 1,000 are free"):
        quantize(model, tmp_path / "out", Recipe(RTN(), RULES), options=OPTIONS)
    assert not (tmp_path / "out").exists()


def locking_like(monkeypatch: pytest.MonkeyPatch, folders: int, files: int = 0) -> None:
    """flock as a file system has it that answers so, 0 as ours does."""
    lock = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        if number := folders if is_folder else files:
            raise OSError(number, os.strerror(number))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_nfs_locks_files_alone(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was said there that another run is writing, to every run."""
    locking_like(monkeypatch, errno.EBADF)
    out, errors = tmp_path / "out", []

    def progress(*_: object) -> None:
        for restart in (False, True):
            with pytest.raises(OutputError, match="another run is writing it") as caught:
                quantize(model, out, Recipe(RTN(), RULES), options=Options(restart=restart))
            errors.append(caught.value)

    quantize(model, out, Recipe(RTN(), RULES), options=Options(shard_size=OPTIONS.shard_size, progress=progress))
    assert errors
    assert result(out) == undisturbed


def test_a_file_system_without_locks_is_said(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    locking_like(monkeypatch, errno.ENOSYS, errno.ENOSYS)
    with pytest.warns(WhitWarning, match="its file system has no locks"):
        quantize(model, tmp_path / "out", Recipe(RTN(), RULES), options=OPTIONS)
    assert result(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_filled(there: bool, model: Path, undisturbed: dict[str, bytes], tmp_path: Path):
    """A folder cannot be renamed to a link: that was found out when all was done."""
    large, link = tmp_path / "disk/large", tmp_path / "out"
    large.parent.mkdir()
    if there:
        large.mkdir()
    link.symlink_to("disk/large")
    account = quantize(model, link, Recipe(RTN(), RULES), options=OPTIONS)
    assert result(large) == undisturbed
    assert quantize(model, link, Recipe(RTN(), RULES), options=OPTIONS) == account
    quantize(model, link, Recipe(rules=[("*", "int8")]), options=Options(restart=True))
    assert link.is_symlink()
    assert result(large) != undisturbed
    assert sorted(path.name for path in (*tmp_path.iterdir(), *large.parent.iterdir())) == ["disk", "large", "out"]


def test_a_place_that_is_mounted_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A container's volume: nothing can be renamed to it."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(OutputError, match="name one inside it"):
        quantize(model, tmp_path / "out", Recipe(RTN(), RULES), options=OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
