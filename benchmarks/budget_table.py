"""The tables and the picture of benchmarks/budget.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

MARKS = {"budget": ("#0072B2", "o"), "uniform": ("#E69F00", "s"), "mix": ("#009E73", "^")}  # Okabe and Ito's palette
NAMES = {"budget": "budget", "uniform": "uniform", "mix": "llama.cpp's mixes, imatrix"}


def best_uniform(rows: dict[str, dict[str, Any]], most: float) -> tuple[str, dict[str, Any]] | None:
    """The one of least divergence among those of at most `most` bytes."""
    fitting = [(label, r) for label, r in rows.items() if r["kind"] == "uniform" and r["weights_bytes"] <= most]
    return min(fitting, key=lambda entry: entry[1]["kl"], default=None)


def table(state: dict[str, Any]) -> str:
    """Markdown: against uniform recipes, against mixes, and the ranking."""
    rows = state["rows"]
    parts = [_uniform(rows), _mixes(rows), _ranking(rows), _note(state)]
    return "\n\n".join(part for part in parts if part)


def _uniform(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for label, row in sorted(rows.items(), key=lambda entry: entry[1]["weights_bytes"]):
        if row["kind"] != "budget" or "-as-" in label:
            continue
        found = best_uniform(rows, row["asked_bytes"])
        name, other = found if found else ("", None)
        met = row["weights_bytes"] / row["asked_bytes"]
        against = ["", "", ""]
        if other is not None:
            against = [f"{other['bits_per_weight']:.3f}", f"{other['kl']:.4f}", f"{row['kl'] / other['kl']:.2f}"]
        lines.append([
            label.removeprefix("budget-"), f"{row['bits_per_weight']:.3f}", f"{100 * met:.2f} %",
            f"{row['predicted']:.4f}", f"{row['kl']:.4f}", f"{row['perplexity']:.2f}",
            name.removeprefix("uniform-"), *against,
        ])  # fmt: skip
    header = (
        "asked",
        "bits",
        "of the size",
        "predicted",
        "KL",
        "perplexity",
        "best uniform",
        "its bits",
        "its KL",
        "ratio",
    )
    return harness.markdown(header, lines) if lines else ""


def _mixes(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for label, row in sorted(rows.items(), key=lambda entry: entry[1]["weights_bytes"]):
        mine = rows.get(label.replace("mix-", "budget-as-"))
        if row["kind"] == "mix" and mine is not None:
            cells = [f"{v:.3f}" for v in (row["bits_per_weight"], mine["bits_per_weight"])]
            kls = [f"{v:.4f}" for v in (row["kl"], mine["kl"])]
            lines.append([label.removeprefix("mix-"), *cells, *kls, f"{mine['kl'] / row['kl']:.2f}"])
    header = ("llama.cpp's mix", "its bits", "budget's bits", "its KL", "budget's KL", "ratio")
    return harness.markdown(header, lines) if lines else ""


def _ranking(rows: dict[str, dict[str, Any]]) -> str:
    drawn = [row for row in rows.values() if row["kind"] == "random"]
    if len(drawn) < 3:
        return ""
    real = [row["kl"] for row in drawn]
    lines = [
        [how, f"{spearman([row['predicted'][how] for row in drawn], real):.3f}"]
        for how in drawn[0]["predicted"]
    ]  # fmt: skip
    return harness.markdown((f"prediction of {len(drawn)} random recipes", "Spearman"), lines)


def _note(state: dict[str, Any]) -> str:
    s = state.get("settings")
    if not s:
        return ""
    return (
        f"{s['model']}, {s['text']}, {s['max_tokens']} tokens, context {s['context']}: mean KL in nats per token "
        f"against the model itself, both in float32. Bits count all bytes of the weight files over all weights. Method "
        f"{s['method']}, {s['samples']} x {s['context']} tokens of {s['calibration']}; sensitivity {s['sensitivity']}. "
        f"`python benchmarks/budget.py`"
    )


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """The correlation of the ranks; no value may occur twice."""

    def ranks(values: Sequence[float]) -> list[int]:
        order = sorted(range(len(values)), key=lambda i: values[i])
        return [order.index(i) for i in range(len(values))]

    n = len(left)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(ranks(left), ranks(right), strict=True)) / (n * (n * n - 1))


def write_plot(state: dict[str, Any], path: Path) -> None:
    """Divergence by bits per weight, where matplotlib is there."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "whit"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for kind, (colour, mark) in MARKS.items():
        mine = sorted(
            (row["bits_per_weight"], row["kl"], label) for label, row in state["rows"].items() if row["kind"] == kind
        )
        if mine:
            line = "-" if kind == "budget" else ""
            axes.plot([b for b, _, _ in mine], [k for _, k, _ in mine], line, c=colour, marker=mark, label=NAMES[kind])
        for bits, kl, label in mine if kind == "mix" else ():
            axes.annotate(label.removeprefix("mix-"), (bits, kl), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(yscale="log", xlabel="bits per weight of the whole model", ylabel="mean KL, nats per token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
