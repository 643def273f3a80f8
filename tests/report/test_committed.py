"""The report under docs/report is whole and of one run: the page, the table and the JSON say the same."""

from __future__ import annotations

import json
from pathlib import Path

from whit.report.front import front
from whit.report.tables import markdown

FOLDER = Path(__file__).parents[2] / "docs" / "report"


def test_the_committed_report_is_of_one_run():
    results = json.loads((FOLDER / "results.json").read_text())
    rows = results["rows"]
    assert len(rows) >= 7  # the original and six candidates
    assert not [row["candidate"] for row in rows if "error" in row]
    page, text = (FOLDER / "report.html").read_text(), (FOLDER / "report.md").read_text()
    assert markdown(rows) in text
    for row in rows:
        assert f'<td data-value="{row["candidate"]}">' in page
    for row in front(rows):
        assert f"- {row['size_bytes'] / 1e6:.1f} MB: `{row['candidate']}`" in text
    for name in ("desktop.png", "phone.png", "pareto.png", "speed.png", "layers.png", "histogram.png", "memory.png"):
        assert (FOLDER / name).read_bytes().startswith(b"\x89PNG"), name
