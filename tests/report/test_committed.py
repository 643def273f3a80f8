"""The reports under docs are whole and of one run: the page, the table and the JSON say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whit.report.front import front
from whit.report.tables import markdown

DOCS = Path(__file__).parents[2] / "docs"
FOLDERS = sorted(path.parent for path in DOCS.glob("report*/results.json"))
SHIPPED = ["bf16", "int8", "nf4-dq", "int4-g64", "gptq:int4-g64", "gptq:int3-g64-asym", "bitsandbytes:nf4"]
REAL = [
    "bf16", "int8", "nf4-dq", "int4-g64", "gptq:int4-g64", "awq:int4-g64", "gptq:int3-g64", "awq:int3-g64", "int2-g32",
    "ternary", "bitsandbytes:nf4", "bitsandbytes:int8",
]  # fmt: skip
CANDIDATES = {"report": SHIPPED, "report-smollm2": REAL}
PICTURES = ("desktop", "phone", "pareto", "speed", "layers", "histogram", "error_bits", "memory", "outliers")


def test_both_committed_reports_are_there():
    assert {folder.name for folder in FOLDERS} == set(CANDIDATES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_committed_report_is_of_one_run(folder: Path):
    results = json.loads((folder / "results.json").read_text())
    rows = results["rows"]
    assert [row["candidate"] for row in rows] == CANDIDATES[folder.name]
    assert not [row["candidate"] for row in rows if "error" in row]
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert markdown(rows) in text
    for row in rows:
        assert f'<td data-value="{row["candidate"]}">' in page
        assert row["prefill"]["median"] > 0 < row["decode"]["median"]
    for row in front(rows):
        assert f"- {row['size_bytes'] / 1e6:.1f} MB: `{row['candidate']}`" in text
    for name in PICTURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
