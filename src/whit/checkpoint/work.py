"""The work folder beside OUT: locked, journaled, resumed, and renamed to OUT in one step when all is there.

`.{OUT}.partial/journal.jsonl` has the run's fingerprint in its first line and then one line per finished unit, each
written after the unit's bytes are on the disk. A torn last line counts as not written, and so does a damaged one: its
unit is done again.

OUT is a folder, or one file (GGUF) with its account beside it, `OUT.whit.json` (`places`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whit.checkpoint.files import write_whole
from whit.checkpoint.journal import append, parse
from whit.checkpoint.places import RECORD, beside, followed, make_folder, record_of, replaced_folder, work_path
from whit.errors import OutputError, WhitWarning

JOURNAL = "journal.jsonl"
HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what flock says where another process holds a lock


class WorkFolder:
    """The folder of one run. `finished` maps the units that earlier runs completed to what they recorded.

    `complete` says that an earlier run was killed within `commit`: only that is left to do.
    """

    def __init__(self, out: Path, fingerprint: str, restart: bool = False) -> None:
        self.out = followed(out)
        self.path = work_path(out)
        self.fingerprint = fingerprint
        self.finished: dict[str, Any] = {}
        make_folder(self.path, self.out)
        self._is_locked = True
        self._lock = self._take_lock()
        if restart:
            os.close(self._journal_file())  # where that is locked in place of the folder, by whom
            for item in self.path.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        self.complete = not (self.path / JOURNAL).exists() and recorded_fingerprint(self.path) == fingerprint
        self._journal = -1 if self.complete else self._open_journal()

    def _take_lock(self) -> int:
        while True:
            self.path.mkdir(exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                self._is_locked = self._locks(descriptor)
            except OutputError:
                os.close(descriptor)
                raise
            try:  # the run that held the lock may have renamed the folder meanwhile
                if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    return descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _locks(self, descriptor: int) -> bool:
        """Lock a folder or a file; False where the file system cannot. OutputError where another run holds it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise OutputError(f"{self.out}: another run is writing it; only one can; wait until it ends") from None
            return False
        return True

    def _journal_file(self) -> int:
        """The journal, open, and locked where the folder cannot be: NFS locks only files that are open for writing."""
        descriptor = os.open(self.path / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not (self._is_locked or self._locks(descriptor)):
                said = f"{self.out}: its file system has no locks; see to it that no other run writes it meanwhile"
                warnings.warn(said, WhitWarning, stacklevel=4)
        except OutputError:
            os.close(descriptor)
            os.close(self._lock)
            raise
        return descriptor

    def _open_journal(self) -> int:
        path, descriptor = self.path / JOURNAL, self._journal_file()
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = parse(whole)
        ours = not lines or (lines[0] is not None and lines[0].get("fingerprint") == self.fingerprint)
        if not ours and len(list(self.path.iterdir())) == 1:
            lines, whole, ours = [], b"", True  # it ended before it wrote anything: the disk was full, say
        if not ours:
            os.close(descriptor)
            os.close(self._lock)
            what = "with another model, recipe or version" if lines[0] else "whose journal does not say of what it is"
            raise OutputError(
                f"{self.out}: an unfinished run {what} lies in {self.path}; "
                "it must be finished with the same ones; or pass --restart to begin again"
            )
        damaged = [str(number) for number, line in enumerate(lines, 1) if line is None]
        if damaged:
            said = f"{path}: damaged in line {', '.join(damaged)}; what was done there is done again"
            warnings.warn(said, WhitWarning, stacklevel=4)
        self.finished = {line["unit"]: line["record"] for line in lines[1:] if line is not None}
        os.ftruncate(descriptor, len(whole))
        os.lseek(descriptor, 0, os.SEEK_END)
        if not lines:
            append(descriptor, {"fingerprint": self.fingerprint})
        return descriptor

    def record(self, unit: str, record: Any) -> None:
        """Journal a unit whose bytes are on the disk."""
        append(self._journal, {"unit": unit, "record": record})
        self.finished[unit] = record

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)

    def commit(self, single: str | None = None) -> None:
        """Everything is written: the folder becomes OUT, or the file named `single` in it does."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        os.fsync(self._lock)
        if single is not None:
            self._commit_file(single)
            return
        old = replaced_folder(self.out)
        if self.out.is_dir() and any(self.out.iterdir()):  # --restart: what was there goes when its successor is there
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.out, old)
        os.rename(self.path, self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _commit_file(self, single: str) -> None:
        """The account first: until the file is there too, the next run finds the work folder complete."""
        shutil.copyfile(self.path / RECORD, beside(self.out))
        os.replace(self.path / single, self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(self.path)

    def close(self) -> None:
        """Give the lock back; what is there stays for the next run."""
        for descriptor in (self._lock, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._journal = -1


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def is_done(out: Path, fingerprint: str, restart: bool) -> bool:
    """Whether OUT holds exactly this result already; OutputError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = recorded_fingerprint(out)
    if found is None:
        raise OutputError(f"{out}: exists and was not written by whit; it must be new or empty; choose another name")
    if restart:
        return False
    if found == fingerprint:
        shutil.rmtree(replaced_folder(out), ignore_errors=True)
        return True
    raise OutputError(
        f"{out}: holds the result of another model, recipe or version; it must be new; "
        "choose another name, or pass --restart to replace it"
    )


def recorded_fingerprint(out: Path) -> str | None:
    """The fingerprint in a result's whit.json, None where there is none."""
    try:
        return str(json.loads(record_of(out).read_text())["source"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full disk, said in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OutputError(
            f"{out}: {os.strerror(error.errno).lower()}; the result must fit; "
            "make room and run the same command again to go on from here"
        ) from None
