"""whit compare --sweep: what is measured once serves every size, and the recipes are candidates like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from whit import Calibration, Options, Recipe
from whit.allocation.space import LADDERS
from whit.data import resolve_model
from whit.errors import RecipeError
from whit.report import sweep as module
from whit.report.candidates import parse_entrants
from whit.report.sweep import Sweep, sweep

pytest.importorskip("scipy")


def test_a_span_becomes_sizes_and_a_wrong_one_is_said():
    assert Sweep.parse("2:4").sizes == (2.0, 2.5, 3.0, 3.5, 4.0)
    assert Sweep.parse("3:3.2:0.1").sizes == (3.0, 3.1, 3.2)
    for wrong in ("", "3", "4:3", "a:b", "0:3", "2:3:0", "2:8:0.001", "1:2:3:4"):
        with pytest.raises(RecipeError, match="write 2:8"):
            Sweep.parse(wrong)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The first block of the shipped model."""
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("whit:model"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return folder


def test_one_measure_serves_all_sizes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LADDERS, "whit", ("int2-g64", "int4-g64"))
    said: list[str] = []
    ask = (str(model), tmp_path, Sweep(2, 4, 1), "rtn", Calibration(samples=1, context=16), Options(device="cpu"))
    files = sweep(*ask, said.append)
    assert [file.name.rpartition("-")[0] for file in files] == ["budget-3", "budget-4"]
    assert any("2 bits per weight: left out" in line for line in said)
    monkeypatch.setattr(module, "measured", None)  # it would fail
    assert sweep(*ask, said.append) == files
    small, large = parse_entrants(",".join(map(str, files)))[1:]
    assert (small.method, small.kind) == ("rtn", "whit")
    assert small.recipe == Recipe.load(files[0])
    assert small.recipe != large.recipe
    table = (tmp_path / "sweep" / "layers.md").read_text().splitlines()
    assert len(table) == 2 + 8 + 1
    assert float(table[-1].split("|")[2]) > float(table[-1].split("|")[3]) > 0
    assert (tmp_path / "sweep" / "layers.png").stat().st_size > 1000
