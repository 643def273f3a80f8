"""Pictures as matplotlib figures: one function each, from plain values; nothing here reads a model.

Colours are Okabe and Ito's, told apart by colour-blind readers; markers, hatches or labels tell them apart in print.
Every axis has its unit.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from whit.report.front import front, measured
from whit.report.layers import Grid

BLUE, ORANGE, GREEN, PURPLE, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
STYLES = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (RED, "v", "-"),
    (SKY, "P", "--"),
)
PARTS = ("weights", "overhead", "KV cache", "activations", "optimizer")  # of memory
Row = Mapping[str, Any]


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _figure(title: str, size: tuple[float, float] = (8.0, 4.2)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def histogram(name: str, weight: np.ndarray | None, quantized: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Weights before (filled) and after (stepped), one panel a format; `quantized` maps it to (values, levels).

    The levels are those of the group with the largest weight: the ticks under the histogram.
    """
    figure = Figure(figsize=(8.0, 2.2 * len(quantized) + 0.6))
    panels = figure.subplots(len(quantized), 1, sharex=True, squeeze=False)[:, 0]
    shown = next(iter(quantized.values()))[0] if weight is None else weight
    limit = float(np.quantile(np.abs(shown), 0.9995))
    bins = np.linspace(-limit, limit, 161)
    for axes, (spec, (values, every)) in zip(panels, quantized.items(), strict=True):
        levels = every[np.abs(every) <= limit]
        if weight is not None:
            axes.hist(weight, bins=bins, color=SKY, alpha=0.7, label="before")
        axes.hist(values, bins=bins, histtype="step", color=RED, linewidth=1.0, label=f"after {spec}")
        axes.plot(
            levels, np.zeros(len(levels)), "|", color="black", markersize=12, label="levels of one group", clip_on=False
        )
        axes.set(yscale="symlog", ylabel="weights")
        axes.set_xlim(-limit, limit)
        axes.legend(fontsize=8, frameon=False, loc="upper right")
        axes.grid(alpha=0.3)
    panels[0].set_title(f"{name}: weights and the levels that exist", fontsize=11)
    panels[-1].set_xlabel("value of a weight")
    return figure


def error_against_bits(name: str, families: Mapping[str, Mapping[int, tuple[float, float, float]]]) -> Figure:
    """`families` maps a family of formats to bits -> (MAE, RMSE, SQNR in dB)."""
    figure = Figure(figsize=(11.0, 3.8))
    panels = figure.subplots(1, 3)
    titles = ("mean absolute error", "root mean squared error", "signal to noise, dB")
    for place, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for (family, points), (colour, marker, line) in zip(families.items(), STYLES, strict=False):
            values = [points[bits][place] for bits in points]
            axes.plot(list(points), values, color=colour, marker=marker, linestyle=line, label=family)
        axes.set(xlabel="bits of a code", ylabel=title, xticks=(2, 3, 4, 6, 8))
        axes.grid(alpha=0.3)
        if place < 2:
            axes.set_yscale("log")
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{name}: error against bits, round to nearest", fontsize=11)
    figure.tight_layout()
    return figure


def pareto(rows: Sequence[Row]) -> Figure:
    """Size against KL; a line joins what nothing smaller beats."""
    figure, axes = _figure("Size against divergence; left and down is better")
    best = front([dict(row) for row in rows])
    names = {row["candidate"] for row in best}
    for row in measured([dict(row) for row in rows]):
        size, low_high = row["size_bytes"] / 1e6, row["kl"]["ci95"]
        mean = row["kl"]["mean"]
        chosen = row["candidate"] in names
        axes.errorbar(
            size, mean, yerr=[[max(mean - low_high[0], 0)], [max(low_high[1] - mean, 0)]], fmt="o" if chosen else "s",
            color=BLUE if chosen else ORANGE, capsize=2,
        )  # fmt: skip
        axes.annotate(row["candidate"], (size, mean), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.plot([r["size_bytes"] / 1e6 for r in best], [r["kl"]["mean"] for r in best], color=BLUE, linewidth=1)
    axes.set(yscale="log", xlabel="size of the weight files, MB", ylabel="mean KL from bf16, nats per token")
    axes.margins(x=0.12)
    return figure


def speed(rows: Sequence[Row], bandwidth: float | None) -> Figure:
    """Tokens per second with their spread; black marks are the limit: memory bandwidth over bytes of the weights."""
    shown = [row for row in rows if "decode" in row]
    figure, axes = _figure("Writing, batch 1", (8.0, 0.42 * len(shown) + 1.4))
    places = list(range(len(shown)))
    medians = [row["decode"]["median"] for row in shown]
    spread = [[row["decode"]["median"] - row["decode"]["low"] for row in shown],
              [row["decode"]["high"] - row["decode"]["median"] for row in shown]]  # fmt: skip
    axes.barh(places, medians, xerr=spread, color=BLUE, height=0.6, capsize=2, label="measured")
    if bandwidth:
        limits = [bandwidth / row["size_bytes"] for row in shown]
        axes.plot(limits, places, "|", color="black", markersize=16, markeredgewidth=2.5,
                  label=f"limit: {bandwidth / 1e9:.1f} GB/s over the weights' bytes")  # fmt: skip
        axes.set_xscale("log")
    axes.set_yticks(places, [row["candidate"] for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second")
    axes.legend(
        fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.28 if len(shown) < 6 else -0.16), ncols=2
    )
    return figure


def layers(name: str, grid: Grid) -> Figure:
    """Relative error of every block and projection."""
    figure, axes = _figure(f"{name}: relative error of every matrix", (8.0, 0.22 * len(grid.blocks) + 2.2))
    values = np.array([[np.nan if e is None else 100 * e for e in row] for row in grid.errors])
    image = axes.imshow(values, aspect="auto", cmap="cividis")
    axes.grid(False)
    axes.set_xticks(range(len(grid.projections)), grid.projections, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(grid.blocks)), list(map(str, grid.blocks)), fontsize=8)
    axes.set_ylabel("block")
    figure.colorbar(image, label="‖W − Ŵ‖ / ‖W‖, per cent")
    return figure


def outliers(channels: Mapping[str, np.ndarray]) -> Figure:
    """Largest |activation| of every input channel of some linears."""
    figure = Figure(figsize=(8.0, 2.1 * len(channels) + 0.6))
    panels = figure.subplots(len(channels), 1, squeeze=False)[:, 0]
    for axes, (name, most) in zip(panels, channels.items(), strict=True):
        axes.vlines(np.arange(len(most)), 0, most, color=BLUE, linewidth=0.8)
        axes.axhline(float(np.median(most)), color=RED, linestyle="--", label=f"median {np.median(most):.3g}")
        axes.set(ylabel="largest |x|", xlim=(-1, len(most)))
        axes.set_title(f"input of {name}: largest {most.max() / max(np.median(most), 1e-12):.0f} times the median",
                       fontsize=9)  # fmt: skip
        axes.legend(fontsize=8, frameon=False, loc="upper right")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("input channel")
    figure.tight_layout()
    return figure


def memory(name: str, stacks: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[float]]]]) -> Figure:
    """One panel a situation, which `stacks` maps to (contexts, part -> bytes): parts on top of each other."""
    figure = Figure(figsize=(5.2 * len(stacks), 4.0))
    panels = figure.subplots(1, len(stacks), squeeze=False)[0]
    colours = dict(zip(PARTS, (BLUE, SKY, ORANGE, GREEN, PURPLE), strict=True))
    hatches = dict(zip(PARTS, ("", "..", "//", "xx", "\\\\"), strict=True))
    for axes, (situation, (contexts, parts)) in zip(panels, stacks.items(), strict=True):
        unit, divisor = ("GB", 1e9) if sum(values[-1] for values in parts.values()) >= 1e9 else ("MB", 1e6)
        drawn = axes.stackplot(
            contexts, [np.array(v) / divisor for v in parts.values()], labels=list(parts),
            colors=[colours[part] for part in parts],
        )  # fmt: skip
        for stack, part in zip(drawn, parts, strict=True):
            stack.set(hatch=hatches[part], edgecolor="white")
        axes.set(xlabel="context, tokens", ylabel=f"memory, {unit}", xlim=(contexts[0], contexts[-1]))
        axes.set_title(situation, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    figure.suptitle(f"{name}: memory against context, batch 1", fontsize=11)
    figure.tight_layout()
    return figure
