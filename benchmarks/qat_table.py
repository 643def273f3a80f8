"""The table and the picture of `qat.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat_cells import WAYS

from harness import machine

TITLES = {"scales": "blocks + scales", "full": "full, distilled", "efficientqat": "EfficientQAT", "bf16": "bf16"}


def report(out: Path, formats: Sequence[str], efficient: Sequence[str]) -> None:
    """The table, as JSON and Markdown, and the plot, of the cells that are there."""
    paths = (out / "cells" / f"{f}__{w}.json" for f, w in _keys(formats, efficient))
    cells = [json.loads(path.read_text()) for path in paths if path.exists()]
    (out / "qat.json").write_text(json.dumps({"machine": machine(), "cells": cells}, indent=1))
    found = {(cell["format"], cell["way"]): cell for cell in cells}
    lines = [
        "| format | way | bits | WikiText-2 | KL | gap closed | wiki_valid | KL | tasks | tokens | minutes | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(cell, found.get((cell["format"], "gptq"))) for cell in cells]
    lines += ["", *said(found)]
    (out / "qat.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    try:
        plot(out / "qat.png", found, formats)
    except ImportError as error:
        print(f"no plot: {error}", flush=True)


def _keys(formats: Sequence[str], efficient: Sequence[str]) -> list[tuple[str, str]]:
    return [("bf16", "bf16"), *((f, w) for f in (*formats, *efficient) for w in (*WAYS, "efficientqat"))]


def row(cell: Mapping[str, Any], gptq: Mapping[str, Any] | None) -> str:
    test, valid = cell["wikitext2"], cell["wiki_valid"]
    closed = "" if gptq is None or cell["way"] in ("rtn", "gptq") else f"{1 - test['kl'] / gptq['wikitext2']['kl']:.0%}"
    average = "" if cell["average"] is None else f"{100 * cell['average']:.1f}"
    return (
        f"| {cell['format']} | {TITLES.get(cell['way'], cell['way'])} | {cell['bits_per_weight']:.2f} | "
        f"{test['perplexity']:.2f} | {test['kl']:.4f} | {closed} | {valid['perplexity']:.2f} | {valid['kl']:.4f} | "
        f"{average} | {trained(cell)} | {cell['minutes']:.1f} | {cell['peak_memory_bytes'] / 1e9:.1f} GB |"
    )


def trained(cell: Mapping[str, Any]) -> str:
    """Million tokens that a run from end to end has seen."""
    training = cell.get("training")
    if not training or "steps" not in cell:
        return ""
    return f"{cell['steps'] * training['course']['batch'] * training['words']['context'] / 1e6:.1f} M"


def said(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """What the table was made for, in words."""
    lines = []
    exact = found.get(("bf16", "bf16"))
    for (format, way), cell in found.items():
        test = cell["wikitext2"]
        if way == "full" and exact is not None:
            ratio = test["perplexity"] / exact["wikitext2"]["perplexity"]
            start = cell.get("start", "gptq")
            lines.append(f"- {format}, full: {ratio:.2f} times bf16's perplexity on WikiText-2; began with {start}.")
        if way == "scales" and (gptq := found.get((format, "gptq"))):
            closed = [1 - cell[text]["kl"] / gptq[text]["kl"] for text in ("wikitext2", "wiki_valid")]
            lines.append(
                f"- {format}, blocks + scales: {closed[0]:.0%} of GPTQ's KL closed ({closed[1]:.0%} wiki_valid)."
            )
        if way == "efficientqat":
            lines.append(f"- {format}, EfficientQAT's recipe with {cell.get('samples')} samples (4096 as published).")
        if cell.get("written") is False:
            lines.append(f"- {format}, {way}: measured as trained, not yet written.")
        if cell.get("packed_equals_trained") is False:
            lines.append(f"- {format}, {way}: the packed weights differ from the trained ones.")
    return lines


def plot(path: Path, found: Mapping[tuple[str, str], Mapping[str, Any]], formats: Sequence[str]) -> None:
    """KL on WikiText-2 of every way, by format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for way in WAYS:
        points = [(i, found[f, way]["wikitext2"]["kl"]) for i, f in enumerate(formats) if (f, way) in found]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=TITLES.get(way, way))
    axes.set_xticks(range(len(formats)), formats)
    axes.set_yscale("log")
    axes.set_ylabel("KL from bf16 on WikiText-2, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
