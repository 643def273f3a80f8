"""Data flows one way: a stage imports only the stages before it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import whit

ROOT = Path(whit.__file__).parent
# Each stage may import those to its left; the values of the first entry belong to all.
STAGES = (
    ("errors", "extras", "named", "rotation", "tensor", "capabilities", "activations", "data", "devices", "process",
     "randomness", "spoken"),
    ("checkpoint",), ("model",), ("calibration",), ("transforms",), ("formats",), ("methods",), ("arrays", "recipe"),
    ("layouts",), ("kernels",), ("modules",), ("export",), ("integrations",), ("compiled",), ("training",),
    ("evaluation",), ("pipeline",), ("allocation",), ("tuning", "merging"), ("report", "memory"), ("qat",),
    ("cli", "__main__"),
)  # fmt: skip
RANK = {name: rank for rank, stage in enumerate(STAGES) for name in stage}
MOST_LINES = 400


def imports(path: Path) -> set[str]:
    """First component below `whit` of everything that a file imports from whit."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "whit":
            names = [node.module] if node.module != "whit" else [f"whit.{a.name}" for a in node.names]
            found |= {n.split(".")[1] for n in names if n}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("whit.")}
    return found


def sources() -> list[Path]:
    return [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


def test_data_flows_one_way():
    wrong = []
    for path in sources():
        stage = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert stage in RANK, f"{stage} has no place in the house; give it one"
        for other in imports(path):
            if other in RANK and RANK[other] > RANK[stage]:
                wrong.append(f"{path.relative_to(ROOT)} imports whit.{other}")
    assert not wrong


def test_the_design_shows_the_stages_in_this_order():
    text = (ROOT.parents[1] / "docs/design.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+/?`(?:, )?)+) \|", text[text.index("| stage |") :], re.MULTILINE)
    shown = [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]
    assert sorted(shown) == sorted(RANK.keys() - {"__main__"})
    assert [RANK[name] for name in shown] == sorted(RANK[name] for name in shown)


def test_files_stay_short():
    assert not [str(p) for p in sources() if p.read_text().count("\n") > MOST_LINES]


def test_test_files_have_names_of_their_own():
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []  # pytest would import one for the other


def test_no_environment_look_ups_outside_the_command_line():
    found = [
        p for p in sources() if "cli" not in p.parts and ("os.environ" in p.read_text() or "getenv(" in p.read_text())
    ]
    assert not found


def test_no_pickles_are_read():
    assert not [p for p in sources() if "torch.load(" in p.read_text() or "import pickle" in p.read_text()]


def test_the_oldest_transformers_that_is_promised_is_the_one_that_runs_the_tests():
    house = ROOT.parents[1]
    promised = re.search(r'"transformers>=([\d.]+)"', (house / "pyproject.toml").read_text())
    tested = re.search(r"^OLDEST_TRANSFORMERS=([\d.]+)$", (house / ".ci/run").read_text(), re.MULTILINE)
    assert promised
    assert tested
    assert tested[1].removesuffix(".0") == promised[1]
