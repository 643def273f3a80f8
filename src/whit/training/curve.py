"""The loss curve as a PNG, where matplotlib is installed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

AVERAGED = 20  # steps that the smooth line looks back over


def draw_curve(log: Sequence[Mapping[str, float]], title: str) -> bytes | None:
    """Loss by step, its running mean, and the held-out loss; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    steps = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    scores = [(entry["step"], entry["held_out_loss"]) for entry in log if "held_out_loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*steps, strict=True), color="0.8", linewidth=0.8, label="each step")
    losses = [loss for _, loss in steps]
    means = [sum(losses[max(i - AVERAGED + 1, 0) : i + 1]) / min(i + 1, AVERAGED) for i in range(len(losses))]
    axes.plot([step for step, _ in steps], means, color="tab:blue", label=f"mean of {AVERAGED} steps")
    if scores:
        axes.plot(*zip(*scores, strict=True), color="tab:orange", marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="loss per response token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
