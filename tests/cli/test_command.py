"""The command `whit` as it is installed: quick where no model is needed, and the same words."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.table import Table
from typer.testing import CliRunner

import whit
import whit_command
from whit.cli import build_app
from whit.cli.console import on_screen, say


def test_the_overview_is_that_of_the_whole_command_line():
    ours, theirs = (
        CliRunner().invoke(app(), ["--help"], prog_name="whit") for app in (whit_command.overview, build_app)
    )
    assert ours.exit_code == theirs.exit_code == 0
    assert ours.output == theirs.output
    assert "quantize" in ours.output


def test_the_version_and_all_else_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(whit_command.metadata, "version", {"whit": whit.__version__}.__getitem__)
    monkeypatch.setattr(sys, "argv", ["whit", "--version"])
    whit_command.main()
    assert capsys.readouterr().out == f"whit {whit.__version__}\n"
    monkeypatch.setattr(sys, "argv", ["whit", "quantize", "--format"])
    with pytest.raises(SystemExit) as wrong:
        whit_command.main()
    assert wrong.value.code == 2


def test_neither_torch_nor_transformers_is_imported_for_them():
    heavy = {"whit", "torch", "transformers"}
    code = f"import sys, whit_command; whit_command.overview(); print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_an_interrupt_while_torch_is_imported_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    class Interrupts:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "whit.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["whit", "doctor"])
    monkeypatch.delitem(sys.modules, "whit.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        whit_command.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "whit: interrupted\n"


@pytest.mark.slow
def test_what_importing_the_package_leaves_for_later():
    """Libraries that only some uses need: each takes a tenth of a second or more."""
    later = {"peft", "matplotlib", "datasets", "gguf", "onnx", "bitsandbytes", "pandas", "lm_eval", "selenium"}
    code = f"import sys, whit.cli; print(sorted({later!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_brackets_in_names_are_said_as_they_are(capsys):
    """rich takes [a] for a style, leaves it out, and fails at one that ends nothing."""
    say("runs[a]/out[/b]: done")
    table = Table("name")
    table.add_row("runs[a]/out[/b]")
    on_screen().print(table)
    said = capsys.readouterr()
    assert said.err == "runs[a]/out[/b]: done\n"
    assert "runs[a]/out[/b]" in said.out
