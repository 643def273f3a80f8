"""The compiled library: built with every instruction set, refused where it is of other sources or was not built."""

from __future__ import annotations

from pathlib import Path

import pytest

from whit.kernels.cpu import build as builder
from whit.kernels.cpu import library
from whit.kernels.cpu.binding import load

COMPILED = library()
ISAS_HERE = () if isinstance(COMPILED, str) else COMPILED.isas

pytestmark = pytest.mark.skipif(isinstance(COMPILED, str), reason=f"CPU kernels: {COMPILED}")


def test_every_instruction_set_was_built_here():
    """gcc 12 and clang 14, which CI has, build all; so none is left out by mistake."""
    assert ISAS_HERE[0] == "scalar"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2 " in flags:
        assert "avx2" in ISAS_HERE
    if " avx512bw " in flags:
        assert "avx512" in ISAS_HERE
    if " avx512_bf16 " in flags:
        assert "avx512_bf16" in ISAS_HERE
    if " amx_bf16 " in flags:
        assert "amx" in ISAS_HERE


def test_a_library_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "not built" in str(load(tmp_path / "absent.so"))
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert "build it again" in str(load(tmp_path / "broken.so"))
    assert builder.is_current()
    assert not any(builder.is_current(tmp_path / name) for name in ("absent.so", "broken.so"))
    monkeypatch.setattr(builder, "source_hash", lambda: "0" * 16)
    assert "other sources" in str(load(builder.LIBRARY))
    assert not builder.is_current()


def test_without_a_compiler_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builder, "find_compiler", lambda: None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        builder.build(tmp_path / "library.so")
    assert "not built: no C++ compiler (c++, g++, clang++) is on the path" in str(load(tmp_path / "library.so"))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="failed"):
        builder.build(tmp_path / "library.so", compiler="false")
    assert not list(tmp_path.iterdir())
