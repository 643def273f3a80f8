"""What fuzzing found stays found: each input of found/ once broke a promise, and is refused in one sentence now."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import pytest

from checks import CHECKS, check

FOUND = sorted((Path(__file__).parent / "found").iterdir())


def test_interesting_files_keep_all_promises(tmp_path: Path):
    """What an hour of fuzzing kept: inputs that reach different lines. Some are whole, most are not."""
    read = dict.fromkeys(CHECKS, 0)
    with ZipFile(Path(__file__).parent / "corpus.zip") as corpus:
        for name in corpus.namelist():
            kind = name.partition("/")[0]
            read[kind] += check(kind, corpus.read(name), tmp_path / "m")
        assert len(corpus.namelist()) == 175
    assert all(0 < count < 75 for count in read.values())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_fuzzing_found_is_refused(path: Path, tmp_path: Path):
    assert not check(path.name.partition("-")[0], path.read_bytes(), tmp_path / "m")
