"""What fuzzing found stays found: each input of found/ once broke a promise, and is refused in one sentence now."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks import check

FOUND = sorted((Path(__file__).parent / "found").iterdir())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_is_refused(path: Path, tmp_path: Path):
    assert not check(path.name.partition("-")[0], path.read_bytes(), tmp_path / "m")
