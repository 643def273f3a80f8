"""Places for OUT: where one can write, with room and with locks, behind links, and written by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest

from forking import in_child
from whit import Options, Recipe
from whit.errors import OutputError, WhitWarning
from whit.pipeline import quantize
from written import result

RECIPE = Recipe("rtn", [("*", "nf4-dq"), ("lm_head", "int4-g32-asym")])
OPTIONS = Options(shard_size=40_000)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(llama, out, RECIPE, options=OPTIONS)
    return result(out)


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "/proc/out"])
def test_a_place_where_nothing_can_be_written_is_said(place: str, llama: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out: cannot be made \(.+\); it must lie where you can write"):
        quantize(llama, tmp_path / place, RECIPE, options=OPTIONS)


def test_links_that_lead_to_each_other_are_said(llama: Path, tmp_path: Path):
    (tmp_path / "out").symlink_to("other")
    (tmp_path / "other").symlink_to("out")
    for out in (tmp_path / "out", tmp_path / "out/deeper"):
        with pytest.raises(OutputError, match=r"cannot be made \(its links lead to each other\)"):
            quantize(llama, out, RECIPE, options=OPTIONS)


def test_two_runs_do_not_write_the_same_folder(llama: Path, tmp_path: Path):
    out, errors = tmp_path / "out", []

    def progress(*_: object) -> None:
        with pytest.raises(OutputError, match="another run is writing it") as caught:
            quantize(llama, out, RECIPE, options=OPTIONS)
        errors.append(caught.value)

    quantize(llama, out, RECIPE, options=Options(shard_size=OPTIONS.shard_size, progress=progress))
    assert errors


@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate", "fdatasync", "write"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    function: str, llama: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original, calls = getattr(os, function), []

    def full(*args: int) -> int:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(original(*args) or 0)

    out, recipe = tmp_path / "out", RECIPE
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OutputError, match=r"no space left on device; .* run the same command again") as caught:
            quantize(llama, out, recipe, options=OPTIONS)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    quantize(llama, out, recipe, options=OPTIONS)
    assert result(out) == undisturbed


def test_a_limit_on_file_size(llama: Path, tmp_path: Path):
    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(OutputError, match="file too large"):
            quantize(llama, tmp_path / "out", RECIPE, options=OPTIONS)

    assert in_child(run) == 0
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_the_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"bytes are needed and 1,000 are free"):
        quantize(llama, tmp_path / "out", RECIPE, options=OPTIONS)
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
    llama: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was said there that another run is writing, to every run."""
    locking_like(monkeypatch, errno.EBADF)
    out, errors = tmp_path / "out", []

    def progress(*_: object) -> None:
        for restart in (False, True):
            with pytest.raises(OutputError, match="another run is writing it") as caught:
                quantize(llama, out, RECIPE, options=Options(restart=restart))
            errors.append(caught.value)

    quantize(llama, out, RECIPE, options=Options(shard_size=OPTIONS.shard_size, progress=progress))
    assert errors
    assert result(out) == undisturbed


def test_a_file_system_without_locks_is_said(
    llama: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    locking_like(monkeypatch, errno.ENOSYS, errno.ENOSYS)
    with pytest.warns(WhitWarning, match="its file system has no locks"):
        quantize(llama, tmp_path / "out", RECIPE, options=OPTIONS)
    assert result(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_filled(there: bool, llama: Path, undisturbed: dict[str, bytes], tmp_path: Path):
    """A folder cannot be renamed to a link: that was found out when all was done."""
    large, link = tmp_path / "disk/large", tmp_path / "out"
    large.parent.mkdir()
    if there:
        large.mkdir()
    link.symlink_to("disk/large")
    account = quantize(llama, link, RECIPE, options=OPTIONS)
    assert result(large) == undisturbed
    assert quantize(llama, link, RECIPE, options=OPTIONS) == account
    quantize(llama, link, Recipe(rules=[("*", "int8")]), options=Options(restart=True))
    assert link.is_symlink()
    assert result(large) != undisturbed
    assert sorted(path.name for path in (*tmp_path.iterdir(), *large.parent.iterdir())) == ["disk", "large", "out"]


def test_a_place_that_is_mounted_is_refused_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A container's volume: nothing can be renamed to it."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(OutputError, match="name a folder inside it"):
        quantize(llama, tmp_path / "out", RECIPE, options=OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
