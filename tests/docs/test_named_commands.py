"""Every figure in README and docs has a command beside it, and the commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from whit.cli import build_app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/whit"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"`(?:python (?:benchmarks|docs)/|make |whit )|^\s*(?:make|python|whit) ", re.MULTILINE)
MEASURED = re.compile(
    r"\d (?:times as|% (?:more|less|faster|slower|of)|tokens per second|GB/s|s and)|\]\([^)]*results/"
)


def sections(text: str) -> list[str]:
    """The page cut at its headings; code and what it prints stay within."""
    return re.split(r"^#+ ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_targets_that_are_named_exist(page: Path):
    text = page.read_text()
    for script in re.findall(r"python ((?:benchmarks|docs)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"[`\n]make ([\w-]+)", text):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_measured_figures_have_a_command_beside_them(page: Path):
    for section in sections(page.read_text()):
        if MEASURED.search(section):
            assert COMMAND.search(section) or "```python" in section or "```bash" in section, section[:200]


def test_paragraphs_that_point_to_results_name_the_script():
    for page in PAGES:
        for paragraph in page.read_text().split("\n\n"):
            if "benchmarks/results/" in paragraph:
                assert re.search(r"`(?:python )?[\w/]+\.py", paragraph), f"{page.name}: {paragraph[:200]}"


def test_every_benchmark_and_every_page_of_results_is_in_the_list():
    folder = ROOT / "benchmarks"
    text = (folder / "README.md").read_text()
    scripts = [path.relative_to(folder) for path in (*folder.glob("*.py"), *folder.glob("peers/*.py"))]
    assert [str(path) for path in scripts if f"`{path}`" not in text] == []
    assert [path.name for path in folder.glob("results/*.md") if f"(results/{path.name})" not in text] == []
    for script in re.findall(r"`([\w/]+\.py)`", text):
        assert (folder / script).is_file(), script
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (folder / link).exists(), link


def test_options_that_are_named_beside_a_command_exist():
    commands: Any = typer.main.get_command(build_app())
    known = {
        name: {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
        for name, command in commands.commands.items()
    }
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        for name, words in re.findall(rf"\bwhit ({'|'.join(known)})\b([^`\n]*)", page.read_text()):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", re.split(r"\bwhit |#|\band\b", words)[0]):
                assert option in known[name], f"{page.name}: whit {name} {option}"


@pytest.mark.parametrize("page", ["design.md", "kernels.md"])
def test_modules_and_names_that_the_design_points_to_exist(page: str):
    """`pipeline/loop.run` is a file of the package, or of its kernels, and a name in it."""
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)+)(?:\.([A-Za-z_]\w*))?(?:\([^`]*\))?`", text)
    assert len(found) > 10
    for module, name in found:
        if module.startswith("tests/"):
            continue
        places = [p / module for p in (PACKAGE, PACKAGE / "export", PACKAGE / "kernels", PACKAGE / "kernels/cpu")]
        files = [file for place in places for file in (place, *place.parent.glob(f"{place.name}.*")) if file.exists()]
        assert files, module
        assert not name or any(file.is_file() and name in names_in(file) for file in files), f"{module}.{name}"


@pytest.mark.parametrize("page", ["kernels.md", "kernels-gpu.md"])
def test_sources_that_a_page_of_kernels_names_exist(page: str):
    found = re.findall(r"`?\b([a-z_0-9*]+\.(?:cu|cuh|cpp|inl|py|json))\b", (ROOT / "docs" / page).read_text())
    assert len(found) > 10
    places = (PACKAGE, ROOT / "benchmarks", ROOT / "build_kernels.py", ROOT / "docs")
    for name in {*found}:
        assert any(place.name == name or any(place.rglob(name)) for place in places), name


def test_the_design_names_every_package():
    text = (ROOT / "docs/design.md").read_text()
    assert [p.parent.name for p in PACKAGE.glob("*/__init__.py") if f"`{p.parent.name}" not in text] == []


def names_in(file: Path) -> set[str]:
    return {file.suffix[1:], *re.findall(r"\w+", file.read_text())}
