"""Draw results/quality.json as divergence by format, largest file first: python benchmarks/plot_quality.py

Writes docs/quality.svg. Colour and marker both tell the method, so that it reads in print.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

import harness

mpl.use("svg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parents[1] / "docs" / "quality.svg"
STYLES = {  # Okabe and Ito's palette
    "rtn": ("#0072B2", "o"),
    "clip": ("#E69F00", "s"),
    "hqq": ("#009E73", "^"),
    "gptq": ("#CC79A7", "D"),
}
WORST = 3.0  # nats; beyond it a model is of no use


def main() -> None:
    rows = json.loads((harness.RESULTS / "quality.json").read_text())["rows"].values()
    shown = [row for row in rows if row["format"] != "bf16" and row["kl_mean"] < WORST]
    formats = sorted({(row["size_bytes"], row["format"]) for row in shown}, reverse=True)
    places = {name: place for place, (_, name) in enumerate(formats)}
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(formats) + 1.2))
    for method, (colour, marker) in STYLES.items():
        mine = [row for row in shown if row["method"] == method]
        x, y = [row["kl_mean"] for row in mine], [places[row["format"]] for row in mine]
        axes.scatter(x, y, s=34, c=colour, marker=marker, label=method, zorder=3)
    axes.set_yticks(range(len(formats)), [f"{name}   {size / 1e6:.0f} MB" for size, name in formats], fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="mean KL divergence from bf16 (269 MB), nats per token; left is better")
    axes.set_title("A 135M Llama model on WikiText-2 test, context 2048: what each format costs", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    mpl.rcParams["svg.hashsalt"] = "whit"
    figure.savefig(OUT, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
