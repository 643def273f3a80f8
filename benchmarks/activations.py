"""Perplexity with quantized activations on a real model: python benchmarks/activations.py MODEL TEXT [--tokens 16384]

Every row is made by `whit.quantize` from the same calibration and read by `from_pretrained`; all rows score the same
tokens, in float32. The change of each against the original comes with its 95 % interval over windows' tokens (paired).
Rows that an earlier run finished are kept.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from torch import Tensor
from transformers.utils import logging

from whit.calibration import Calibration
from whit.evaluation.listener import Silent
from whit.evaluation.perplexity import score_windows
from whit.evaluation.text import cut_windows, read_text, tokenize
from whit.integrations.loading import load_causal_lm, load_tokenizer
from whit.job import Options
from whit.pipeline import quantize
from whit.recipe import Recipe

import harness

# label: method, format, activations
ROWS = {
    "bf16": None,
    "int8 (weights alone)": ("rtn", "int8", None),
    "LLM.int8()": ("rtn", "llm.int8", None),
    "W8A8 dynamic": ("rtn", "w8a8", None),
    "SmoothQuant, W8A8 dynamic": ("smoothquant", "w8a8", None),
    "W8A8 dynamic, per 32 columns": ("rtn", "int8", "int8-g32"),
    "FP8 dynamic": ("rtn", "w8a8-fp8", None),
    "W8A8 static, min-max": ("rtn", "int8", "int8-static"),
    "W8A8 dynamic, down_proj int8-g64": ("rtn", "w8a8", None),
    "LLM.int8(), down_proj int8-g64": ("rtn", "llm.int8", None),
    "SmoothQuant, W8A8 dynamic, down_proj int8-g64": ("smoothquant", "w8a8", None),
    "W8A8 static, MSE": ("rtn", "int8", "int8-static-mse"),
    "SmoothQuant, W8A8 static, min-max": ("smoothquant", "int8", "int8-static"),
    "W8A8 dynamic, asymmetric": ("rtn", "int8", "int8-asym"),
    "W8A8 static, percentile 99.99": ("rtn", "int8", "int8-static-percentile99.99"),
    "W8A8 static, entropy": ("rtn", "int8", "int8-static-entropy"),
    "W8A8 static, moving average": ("rtn", "int8", "int8-static-moving0.1"),
    "W8A8 static, min-max, asymmetric": ("rtn", "int8", "int8-static-asym"),
    "FP8 static": ("rtn", "fp8", "fp8-static"),
}


def losses(folder: str, windows: Tensor, device: str) -> Tensor:
    """-log p of every predicted token, float64 (windows, context - 1)."""
    return score_windows(load_causal_lm(folder, device=device, dtype="float32"), windows, Silent())


def made(args: argparse.Namespace, label: str) -> str:
    """The folder of a row."""
    if ROWS[label] is None:
        return str(args.model)
    method, format, activations = ROWS[label]
    down = [("*down_proj", "int8-g64")] if "down_proj" in label else []  # in groups, and so without activations
    recipe = Recipe(method, [("*", format), *down], activations=activations)
    out = Path(args.scratch) / "".join(c if c.isalnum() else "_" for c in label)
    text = Calibration(args.calibration, samples=args.samples, context=512, seed=0) if recipe.needs_stats else None
    quantize(args.model, out, recipe, calibration=text, options=Options(device=args.device))
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", default="whit:text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="only the first so many")
    parser.add_argument("--scratch", default="/tmp/whit-activations")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = tokenize(read_text(Path(args.text)), load_tokenizer(args.model), args.tokens, args.text)
    windows = cut_windows(tokens, args.context)
    path = harness.RESULTS / "activations.json"
    settings = {k: getattr(args, k) for k in ("calibration", "samples", "tokens", "context")}
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before.get("rows", {}) if before.get("settings") == settings else {}
    Path(args.scratch).mkdir(exist_ok=True)
    exact = losses(str(args.model), windows, args.device)
    for label in list(ROWS)[: args.rows]:
        if label not in rows:
            found = exact if ROWS[label] is None else losses(made(args, label), windows, args.device)
            change = (found - exact).flatten()
            half = 1.96 * float(change.std()) / math.sqrt(len(change))
            rows[label] = {"perplexity": float(found.mean().exp()), "change": float(change.mean()), "half": half}
            print(label, rows[label], flush=True)
        write(rows, settings, args)


def write(rows: dict[str, dict[str, float]], settings: dict[str, object], args: argparse.Namespace) -> None:
    """The table of all rows that are done."""
    table = []
    for label in (label for label in ROWS if label in rows):
        row = rows[label]
        change = f"{100 * math.expm1(row['change']):+.2f} ± {100 * row['half']:.2f} %" if ROWS[label] else ""
        table.append((label, f"{row['perplexity']:.3f}", change))
    note = (
        f"\n{Path(args.model).name}, the first {args.tokens} tokens of {Path(args.text).name} in windows of "
        f"{args.context}, float32 on a {args.device}; static scales and SmoothQuant (alpha 0.5) from {args.samples} "
        f"windows of 512 tokens of {args.calibration}. The change is of the same tokens, with the 95 % interval of its "
        "mean."
    )
    result = {"machine": harness.machine(), "settings": settings, "rows": rows}
    harness.save("activations", result, harness.markdown(("", "perplexity", "change"), table) + "\n" + note)


if __name__ == "__main__":
    main()
