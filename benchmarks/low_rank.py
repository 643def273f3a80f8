"""What a side-car repairs without training: python benchmarks/low_rank.py MODEL TEXT [--candidates gptq:int2-g32 ...]

Every candidate METHOD:FORMAT is quantized and compared with the original: mean KL divergence, perplexity, bits per
weight of the whole file, and bits of a linear with its side-car. Candidates that an earlier run finished are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from whit.calibration import Calibration
from whit.evaluation import EvaluationOptions, evaluate
from whit.pipeline import quantize
from whit.pipeline.job import Options
from whit.recipe import Recipe

import harness

CANDIDATES = (
    "gptq:int2-g32", "gptq:int2-g32+r16", "gptq:int3-g64", "gptq:int3-g64+r16",
    "rtn:int2-g32", "rtn:int2-g32+r16", "rtn:int3-g64", "rtn:int3-g64+r16",
)  # fmt: skip
HEADER = ("candidate", "bits of a linear", "bits per weight", "KL", "perplexity", "KL without / with")


def run(args: argparse.Namespace, candidate: str) -> dict[str, Any]:
    """One candidate, made and measured."""
    method, _, format = candidate.partition(":")
    calibration = Calibration(args.calibration, args.samples, args.context)
    with TemporaryDirectory() as folder:
        recipe, out = Recipe(method, [("*", format)]), Path(folder) / "out"
        account = quantize(
            args.model, out, recipe, calibration=calibration if recipe.needs_stats else None,
            options=Options(device=args.device),
        )  # fmt: skip
        how = EvaluationOptions(
            baseline=args.model, text=args.text, context=args.context, max_tokens=args.tokens, device=args.device
        )
        found = evaluate(str(out), how)
    assert found.baseline is not None
    linear = [e for e in account.parameters if e.format == format]
    return {
        "bits_of_a_linear": sum(e.bits_per_weight or 0.0 for e in linear) / len(linear),
        "bits_per_weight": account.bits_per_weight,
        "kl": found.baseline.kl_mean,
        "perplexity": found.perplexity,
        "baseline_perplexity": found.baseline.perplexity,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = []
    for name, row in rows.items():
        plain = rows.get(name.partition("+r")[0])
        gain = f"{plain['kl'] / row['kl']:.2f}" if plain is not None and plain is not row else ""
        figures = (row["bits_of_a_linear"], row["bits_per_weight"])
        lines.append((name, *(f"{f:.3f}" for f in figures), f"{row['kl']:.4f}", f"{row['perplexity']:.2f}", gain))
    return harness.markdown(HEADER, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    parser.add_argument("--calibration", default="whit:text")
    parser.add_argument("--name", default="low_rank")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    file = harness.RESULTS / f"{args.name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for candidate in args.candidates:
        rows.setdefault(candidate, None)
        rows[candidate] = rows[candidate] or run(args, candidate)
        done = {name: row for name, row in rows.items() if row}
        setting = {key: getattr(args, key) for key in ("text", "calibration", "samples", "context", "tokens", "device")}
        about = f"calibrated on {args.samples} x {args.context} tokens of {args.calibration}; "
        about += f"measured on {args.tokens or 'all'} tokens of {args.text}."
        harness.save(
            args.name,
            {"model": Path(args.model).name, "setting": setting, "machine": harness.machine(), "rows": done},
            f"{Path(args.model).name}: {about}\n\n{table(done)}",
        )


if __name__ == "__main__":
    main()
