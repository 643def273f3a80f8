"""Completion in a shell: all options, the names that whit knows, and no import of torch at a TAB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from whit.cli import build_app
from whit.cli.completion import completions
from whit_command import COMMANDS, completion


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return completions()


def complete(table: dict[str, Any], words: str) -> list[str]:
    place = len(words.split(" ")) - 1
    env = {"_WHIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    return CliRunner().invoke(completion.app(table, COMMANDS), [], env=env, prog_name="whit").stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("whit qu", ["quantize"]),
        ("whit quantize --me", ["--method"]),
        ("whit quantize M OUT --format nf4-", ["nf4-dq", "nf4-g128"]),
        ("whit quantize M OUT --format q4_k_", ["q4_k_s", "q4_k_m"]),
        ("whit quantize M OUT --method gp", ["gptq"]),
        ("whit quantize M OUT --method awq", ["awq", "awq+gptq"]),
        ("whit quantize M OUT --export gg", ["gguf"]),
        ("whit quantize wh", ["whit:model"]),
        ("whit quantize ", []),  # files
        ("whit train M OUT --recipe b", ["bitnet"]),
        ("whit compare M OUT --candidates int8,fp4", ["int8,fp4", "int8,fp4-dq"]),
        ("whit generate M --no-", ["--no-compile"]),
        ("whit evaluate M --text whit:h", ["whit:heldout"]),
        ("whit bench mo", ["model"]),
    ],
)
def test_what_a_shell_is_told(words: str, found: list[str], table: dict[str, Any]):
    assert sorted(complete(table, words)) == sorted(found)


def test_the_table_has_every_option(table: dict[str, Any]):
    assert json.loads(json.dumps(table)) == table
    commands: Any = typer.main.get_command(build_app())
    assert table.keys() == commands.commands.keys() == COMMANDS.keys()
    for name, command in commands.commands.items():
        options = {option for each in table[name] for told in each["options"] for option in told.split("/")}
        assert options | {"--help"} == {
            o for p in command.params if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)
        } | {"--help"}


def test_a_tab_imports_no_torch_and_a_change_makes_the_table_again(tmp_path: Path, table: dict[str, Any]):
    (tmp_path / "whit").mkdir()
    kept = tmp_path / "whit" / "completion.json"
    kept.write_text(json.dumps({"key": completion._key(), "commands": table}))
    code = "import sys, whit_command; sys.argv = ['whit']; sys.modules['torch'] = None; whit_command.main()"
    words = {"_WHIT_COMPLETE": "complete_bash", "COMP_WORDS": "whit quantize --me", "COMP_CWORD": "2"}
    env = {**os.environ, **words, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["--method"], done.stderr
    for content in ("{", json.dumps({"key": "older", "commands": {}})):
        kept.write_text(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            assert completion.table() == table
        assert json.loads(kept.read_text())["commands"] == table
    assert [path.name for path in kept.parent.iterdir()] == ["completion.json"]
