"""Where a result lies: OUT, the work folder beside it while it grows, its account; and whether it can lie there.

A link at OUT is followed: what it leads to is made, and the work folder lies beside that.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from whit.errors import OutputError

RECORD = "whit.json"


def followed(out: Path) -> Path:
    """OUT, or what a link there leads to."""
    return out.resolve() if out.is_symlink() else out


def work_path(out: Path) -> Path:
    """Where a result lies until it is complete."""
    out = followed(out)
    return out.parent / f".{out.name}.partial"


def replaced_folder(out: Path) -> Path:
    """Where an older result lies for the moment in which its successor takes its place."""
    out = followed(out)
    return out.parent / f".{out.name}.old"


def beside(file: Path) -> Path:
    """Where the account of a result that is one file lies."""
    return file.with_name(f"{file.name}.{RECORD}")


def record_of(out: Path) -> Path:
    """Where the account of a result lies."""
    if not out.is_file():
        return out / RECORD
    own = beside(out)  # in the hub's cache the file is a link, and the account another
    return own if own.exists() or not out.is_symlink() else beside(followed(out))


def make_folder(folder: Path, out: Path) -> None:
    """Make a folder of OUT's, and those above it; OutputError where that cannot be."""
    check_place(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # of a file system that says otherwise than its permissions
        raise _no_place(out, error.strerror or str(error)) from None


def check_place(out: Path) -> None:
    """OutputError where nothing can be written at OUT: the nearest that exists above it is no folder, or is closed."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise _no_place(out, f"{folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _no_place(out, f"{folder} cannot be written")


def _no_place(out: Path, reason: str) -> OutputError:
    return OutputError(f"{out}: cannot be made ({reason}); it must lie where you can write; choose another place")


def check_out(out: Path, model: Path, suffix: str = "", what: str = "MODEL") -> None:
    """OutputError where OUT has no name, is MODEL (or `what` is read beside it), lies inside it, or holds it, is a file
    that does not end with `suffix`, or lies where nothing can be written."""
    if out.name in ("", ".."):
        raise OutputError(f"OUT {str(out)!r}: is not a name; OUT must name a new folder or file; give one")
    _check_links(out)
    ours, theirs = out.resolve(), model.resolve()
    if ours == theirs or theirs in ours.parents:
        raise OutputError(
            f"{out}: lies inside {what} {model}; it must lie elsewhere, as {what} is never written; choose another"
        )
    if str(out).startswith("whit:"):
        raise OutputError(f"{out}: is a name of what ships with whit; OUT must be a new folder; choose another name")
    if ours in theirs.parents:
        raise OutputError(f"{out}: holds {what} {model}; it must lie elsewhere; choose another folder")
    if out.exists() and not out.is_dir() and not (suffix and out.name.endswith(suffix)):
        raise OutputError(f"{out}: is a file; it must be a new folder; choose another name")
    if out.is_mount():  # a container's volume, say
        raise OutputError(f"{out}: is a mount point, which a new folder cannot replace; name a folder inside it")
    check_place(followed(out))


def _check_links(out: Path) -> None:
    try:
        out.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_place(out, "its links lead to each other") from None


def check_space(folder: Path, needed: int) -> None:
    """OutputError where the disk under `folder` has fewer than `needed` bytes free."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"{folder}: {needed:,} bytes are needed and {free:,} are free; the disk must hold the result; make room"
        )
