"""What `whit doctor` says of this machine, and the one place that says which libraries are optional."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import whit
from whit.cli import doctor
from whit.extras import EXTRAS, missing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stored = {
        name: tuple(re.split(r"[<>=; ]", requirement)[0] for requirement in packages)
        for name, packages in project["optional-dependencies"].items()
        if name not in ("dev", "docs")  # of which no command asks for anything
    }
    assert {name: extra.packages for name, extra in EXTRAS.items()} == stored


def test_every_extra_is_shown_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "installed", {"matplotlib": "3.9", "jinja2": "3.1", "peft": None}.get)
    doctor.doctor(as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["extras"].keys() == EXTRAS.keys()
    assert said["extras"]["report"] == "to draw pictures and write pages: matplotlib 3.9, jinja2 3.1"
    assert said["extras"]["train"].endswith("adapters: peft not installed; pip install 'whit[train]'")


def test_a_library_that_is_not_there_is_said_in_one_wording():
    assert missing("gguf", "m.gguf") == (
        "m.gguf: gguf is not installed; it is needed to read .gguf files; pip install 'whit[gguf]'"
    )
    source = Path(whit.__file__).parent
    others = [path for path in source.rglob("*.py") if re.search(r"[\"'].*pip install.*whit\[", path.read_text())]
    assert {path.name for path in others} <= {"extras.py"}
