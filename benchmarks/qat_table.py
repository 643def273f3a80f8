"""The table and the picture of `qat.py`."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat_cells import WAYS

from harness import machine

TEXTS = (("wikitext2", "WikiText-2's test text"), ("wiki_valid", "wiki_valid"))
PUBLISHED, OWN_SAMPLES = 4096, 128
SHARED = "3 to 15"  # where a cell does not say how many ran at most
TITLES = {"scales": "blocks + scales", "full": "full, distilled", "efficientqat": "EfficientQAT", "bf16": "bf16"}


def report(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """The table, as JSON and Markdown, and the plot, of the cells that are there: first those of `formats`."""
    out = args.out
    formats = list(dict.fromkeys((*formats, *args.formats.split(","))))
    paths = (out / "cells" / f"{f}__{w}.json" for f, w in _keys(formats, args.efficient_formats.split(",")))
    cells = [json.loads(path.read_text()) for path in paths if path.exists()]
    before = json.loads((out / "qat.json").read_text()) if (out / "qat.json").exists() else {}
    made, notes = _machine(before, cells), before.get("notes", ())
    record = {"machine": made, "cells": cells, **({"notes": notes} if notes else {})}
    (out / "qat.json").write_text(json.dumps(record, indent=1) + "\n")
    found = {(cell["format"], cell["way"]): cell for cell in cells}
    lines = [
        "| format | way | bits | WikiText-2 | KL | gap closed | wiki_valid | KL | tasks | tokens | minutes | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(cell, found.get((cell["format"], "gptq"))) for cell in cells]
    lines += ["", *said(found)]
    text = "\n".join([*head(args, cells, made, notes), *lines]) + "\n"
    (out / "qat.md").write_text(text)
    print(text, flush=True)
    try:
        plot(out / "qat.png", found, [f for f in formats if any(form == f for form, _ in found)])
    except ImportError as error:
        print(f"no plot: {error}", flush=True)


def _keys(formats: Sequence[str], efficient: Sequence[str]) -> list[tuple[str, str]]:
    return [("bf16", "bf16"), *((f, w) for f in (*formats, *efficient) for w in (*WAYS, "efficientqat"))]


def _machine(before: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Where the cells were made: as they say, as an earlier table says, or else here."""
    known = [cell["machine"] for cell in cells if "machine" in cell]
    return dict(known[0] if known else before.get("machine") or machine())


def head(
    args: argparse.Namespace, cells: Sequence[Mapping[str, Any]], made: Mapping[str, Any], notes: Sequence[str]
) -> list[str]:
    """What the table is of, before it; `notes` are an earlier qat.json's."""
    if not cells:
        return ["# Quantization after training, and in training", ""]
    sizes = [f"{cells[0][text]['tokens']:,} tokens of {name}" for text, name in TEXTS]
    tasks = [f"{task['items']} items of {name}" for name, task in cells[0].get("tasks", {}).items()]
    scales = next((trained(cell) for cell in cells if cell["way"] == "scales"), "")
    paragraphs = [
        f"{Path(args.model).name} on {made.get('gpu') or made['cpu']} by `python benchmarks/qat.py`; perplexity and KL "
        f"from bf16 over {' and '.join(sizes)}; tasks is the mean accuracy over {' and '.join(tasks) or 'none'}; bits "
        "per weight are those of the whole file, whose tied embedding stays in bfloat16. `blocks` trains each block by "
        f"itself from GPTQ's codes ({args.samples} windows of {args.context:,} tokens), `blocks + scales` then trains "
        f"the scales alone from end to end ({scales or 'no'} tokens), `full` all weights and scales, distilled from "
        "the bf16 model, from what `blocks` left. Minutes include what a way began with, and that a GPU was shared by "
        f"{SHARED} processes{_alone(cells)}; memory is the most that torch held.",
        *notes,
        *(efficient(cell) for cell in cells if cell["way"] == "efficientqat"),
    ]
    lines = ["# Quantization after training, and in training", ""]
    for paragraph in paragraphs:
        lines += [*textwrap.wrap(paragraph, 120, break_long_words=False, break_on_hyphens=False), ""]
    return lines


def _alone(cells: Sequence[Mapping[str, Any]]) -> str:
    alone = any(cell.get("jobs") == 1 for cell in cells if cell["way"] == "efficientqat")
    return " (EfficientQAT had it to itself)" if alone else ""


def efficient(cell: Mapping[str, Any]) -> str:
    """How much of EfficientQAT's published recipe its row is."""
    samples = int(cell["samples"])
    share = (
        f"in full: {samples:,} samples, two epochs of every block ({cell['blocks_minutes']:.1f} min) and one of the "
        "scales from end to end. Its rates were made for models of 7 B weights."
        if samples >= PUBLISHED
        else f"with {samples:,} samples where {PUBLISHED:,} were published, {samples / PUBLISHED:.3g} of its steps: at "
        "rates made for 7 B models that is too few for this one, and the row says no more than that."
    )
    return (
        f"EfficientQAT's row is its published recipe (rounding to nearest, its rates, its batches) {share} The row "
        f"that is like it in all but the recipe is `blocks + scales` of the same format, from {OWN_SAMPLES} samples."
    )


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
