"""What each option of GPTQ gains: python benchmarks/gptq_options.py [MODEL] [--formats int4-g64 ...] [--minutes N]

Every option alone and some together, quantized with the windows of each seed and compared with the original on text
that was not calibrated with: mean KL divergence, its spread over the seeds, and its ratio to plain GPTQ's with the
same windows. The plain one searches each group's range (`clip`); one row is without. Runs that results/NAME.json
holds are kept, so that a run that was cut short goes on; the table is written after each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from whit import GPTQ, Calibration, Options, Recipe, Refine
from whit.evaluation import EvaluationOptions, evaluate
from whit.pipeline import quantize

import harness

FORMATS = ("int4-g64", "int2-g32-asym")
CANDIDATES: Mapping[str, tuple[Any, str | None]] = {  # a method and a transform
    "plain": (GPTQ(), None),
    "clip off": (GPTQ(clip=False), None),
    "act_order": (GPTQ(act_order=True), None),
    "refit": (GPTQ(refit=True), None),
    "sweeps = 1": (GPTQ(sweeps=1), None),
    "sweeps = 2": (GPTQ(sweeps=2), None),
    "refit, sweeps = 1": (GPTQ(refit=True, sweeps=1), None),
    "act_order, refit, sweeps = 2": (GPTQ(act_order=True, refit=True, sweeps=2), None),
    "asymmetric = 0.25": (GPTQ(asymmetric=0.25), None),
    "asymmetric = 0.5": (GPTQ(asymmetric=0.5), None),
    "asymmetric = 1": (GPTQ(asymmetric=1.0), None),
    "refit, sweeps = 1, asymmetric = 0.25": (GPTQ(refit=True, sweeps=1, asymmetric=0.25), None),
    "refit, sweeps = 1, asymmetric = 0.5": (GPTQ(refit=True, sweeps=1, asymmetric=0.5), None),
    "act_order, asymmetric = 0.25": (GPTQ(act_order=True, asymmetric=0.25), None),
    "act_order, asymmetric = 0.5": (GPTQ(act_order=True, asymmetric=0.5), None),
    "act_order, refit, sweeps = 2, asymmetric = 0.25": (
        GPTQ(act_order=True, refit=True, sweeps=2, asymmetric=0.25),
        None,
    ),
    "after AWQ's scales": (GPTQ(), "awq"),
    "after AWQ's scales, asymmetric = 0.25": (GPTQ(asymmetric=0.25), "awq"),
    "then refine, 100 steps": (Refine(steps=100), None),
}


def run(args: argparse.Namespace, name: str, format: str, seed: int) -> dict[str, Any]:
    """One option at one format with one seed's windows, made and measured."""
    method, transform = CANDIDATES[name]
    calibration = Calibration(args.calibration, args.samples, args.context, seed)
    with TemporaryDirectory(dir=args.scratch) as folder:
        recipe, out = Recipe(method, [("*", format)], transform), Path(folder) / "out"
        account = quantize(args.model, out, recipe, calibration=calibration, options=Options(device=args.device))
        how = EvaluationOptions(
            baseline=args.model, text=args.text, context=args.context, max_tokens=args.tokens, device=args.device
        )
        found = evaluate(str(out), how)
    assert found.baseline is not None
    losses = [entry.proxy_loss for entry in account.parameters if entry.proxy_loss is not None]
    return {
        "option": name, "format": format, "seed": seed, "kl": found.baseline.kl_mean, "perplexity": found.perplexity,
        "proxy_loss": statistics.mean(losses), "seconds": account.seconds,
    }  # fmt: skip


def cell(runs: Sequence[dict[str, Any]], plain: Mapping[int, float]) -> str:
    """KL with its spread, and the ratio to plain GPTQ's over the same windows."""
    if not runs:
        return "not run"
    kl = [run["kl"] for run in runs]
    ratios = [run["kl"] / plain[run["seed"]] for run in runs if run["seed"] in plain]
    ratio = f", x {statistics.mean(ratios):.2f}" if ratios else ""
    spread = f" ±{(max(kl) - min(kl)) / 2:.4f}" if len(kl) > 1 else ""
    return f"{statistics.mean(kl):.4f}{spread}{ratio}"


def table(runs: Sequence[dict[str, Any]], note: str) -> str:
    """A row per option, a column per format."""
    formats = list(dict.fromkeys(run["format"] for run in runs))
    lines = []
    for name in CANDIDATES:
        cells = []
        for format in formats:
            here = [run for run in runs if run["format"] == format]
            plain = {run["seed"]: run["kl"] for run in here if run["option"] == "plain"}
            cells.append(cell([run for run in here if run["option"] == name], plain))
        lines.append([name, *cells])
    return f"{harness.markdown(['option of GPTQ', *formats], lines)}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="whit:model")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--rows", nargs="+", choices=CANDIDATES, help="of the table; all of them unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--calibration", default="whit:text")
    parser.add_argument("--text", default="whit:heldout", help="on which KL is measured")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384, help="of the text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="gptq_options")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--minutes", type=float, default=1e6, help="after so many no further run is begun")
    args = parser.parse_args()
    file, start = harness.RESULTS / f"{args.name}.json", time.monotonic()
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    for seed in args.seeds:
        for format in args.formats:
            for name in args.rows or CANDIDATES:
                if any((r["option"], r["format"], r["seed"]) == (name, format, seed) for r in runs):
                    continue
                if time.monotonic() - start < 60 * args.minutes:
                    runs.append(run(args, name, format, seed))
                    save(args, runs)
    save(args, runs)


def save(args: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """The runs and their table."""
    seeds = sorted({run["seed"] for run in runs})
    note = (
        f"KL in nats per token (± half its range over the seeds, x the share of plain GPTQ's) of {args.model} on "
        f"{args.tokens:,} tokens of {Path(args.text).name}, {args.samples} x {args.context} tokens of calibration, "
        f"seeds {', '.join(map(str, seeds))}. `python benchmarks/gptq_options.py`"
    )
    harness.save(args.name, {"machine": harness.machine(), "runs": list(runs)}, table(runs, note))


if __name__ == "__main__":
    main()
