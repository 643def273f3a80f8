"""Perplexity with quantized activations on a real model: python benchmarks/activations.py MODEL TEXT [--tokens 16384]

Every row is made by `whit.quantize` from the same calibration and read by `from_pretrained`; all rows score the same
tokens, in float32. The change of each against the original comes with its 95 % interval over windows' tokens (paired).
Rows that an earlier run with the same settings finished are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

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

DYNAMIC_DOWN = [("*down_proj", "w8a8")]  # a scale per token where few tokens hold all that is large
FLOAT_DOWN = [("*down_proj", "int8-g64")]  # in groups, and so without quantized activations
FIXED = {"name": "smoothquant", "alpha": 0.5}
# label: what goes to a recipe
ROWS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8 (weights alone)": {"rules": [("*", "int8")]},
    "LLM.int8()": {"rules": [("*", "llm.int8")]},
    "W8A8 dynamic": {"rules": [("*", "w8a8")]},
    "SmoothQuant, W8A8 dynamic": {"method": "smoothquant"},
    "SmoothQuant, W8A8 static, down_proj dynamic": {
        "method": "smoothquant", "rules": [("*", "w8a8-static"), *DYNAMIC_DOWN],
    },
    "SmoothQuant, LLM.int8()": {"method": "smoothquant", "rules": [("*", "llm.int8")]},
    "SmoothQuant, GPTQ, W8A8 dynamic": {"method": "smoothquant+gptq"},
    "SmoothQuant, GPTQ, W8A8 static, down_proj dynamic": {
        "method": "smoothquant+gptq", "rules": [("*", "w8a8-static"), *DYNAMIC_DOWN],
    },
    "LLM.int8(), threshold 3": {"rules": [("*", "int8-absmax")], "activations": "int8-outliers3"},
    "W8A8 static, min-max": {"rules": [("*", "w8a8-static")]},
    "W8A8 static, min-max, down_proj dynamic": {"rules": [("*", "w8a8-static"), *DYNAMIC_DOWN]},
    "SmoothQuant, W8A8 static, down_proj in 16 bits": {
        "method": "smoothquant", "rules": [("*", "w8a8-static"), *FLOAT_DOWN],
    },
    "SmoothQuant, W8A8 static, MSE, down_proj dynamic": {
        "method": "smoothquant", "rules": [("*", "int8"), *DYNAMIC_DOWN], "activations": "int8-static-mse",
    },
    "SmoothQuant with alpha 0.5, W8A8 dynamic": {"transform": FIXED},
    "GPTQ, W8A8 dynamic": {"method": "gptq", "rules": [("*", "w8a8")]},
    "W8A8 dynamic, asymmetric": {"rules": [("*", "int8")], "activations": "int8-asym"},
    "W8A8 dynamic, per 32 columns": {"rules": [("*", "int8")], "activations": "int8-g32"},
    "FP8 dynamic": {"rules": [("*", "w8a8-fp8")]},
    "W8A8 static, MSE": {"rules": [("*", "int8")], "activations": "int8-static-mse"},
    "W8A8 static, percentile 99.99": {"rules": [("*", "int8")], "activations": "int8-static-percentile99.99"},
    "W8A8 static, entropy": {"rules": [("*", "int8")], "activations": "int8-static-entropy"},
    "W8A8 static, moving average": {"rules": [("*", "int8")], "activations": "int8-static-moving0.1"},
    "W8A8 static, min-max, asymmetric": {"rules": [("*", "int8")], "activations": "int8-static-asym"},
    "FP8 static": {"rules": [("*", "fp8")], "activations": "fp8-static"},
}  # fmt: skip


def losses(folder: str, windows: Tensor, device: str) -> Tensor:
    """-log p of every predicted token, float64 (windows, context - 1)."""
    return score_windows(load_causal_lm(folder, device=device, dtype="float32"), windows, Silent())


def made(args: argparse.Namespace, label: str) -> str:
    """The folder of a row."""
    recipe = Recipe(**ROWS[label])
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many")
    parser.add_argument("--name", default="activations", help="of the results' files")
    parser.add_argument("--scratch", default="/tmp/whit-activations")
    args, start = parser.parse_args(), time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = tokenize(read_text(Path(args.text)), load_tokenizer(args.model), args.tokens, args.text)
    windows = cut_windows(tokens, args.context)
    path = harness.RESULTS / f"{args.name}.json"
    settings = {k: getattr(args, k) for k in ("calibration", "samples", "tokens", "context")}
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before.get("rows", {}) if before.get("settings") == settings else {}
    Path(args.scratch).mkdir(exist_ok=True)
    exact = losses(str(args.model), windows, args.device)
    for label in list(ROWS)[: args.rows]:
        if label not in rows and time.monotonic() - start < args.seconds:
            found = exact if not ROWS[label] else losses(made(args, label), windows, args.device)
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
        f"{args.context}, float32 on a {args.device}; static scales, SmoothQuant and GPTQ from {args.samples} "
        f"windows of 512 tokens of {args.calibration}. The change is of the same tokens, with the 95 % interval of its "
        "mean."
    )
    result = {"machine": harness.machine(), "settings": settings, "rows": rows}
    harness.save(args.name, result, harness.markdown(("", "perplexity", "change"), table) + "\n" + note)


if __name__ == "__main__":
    main()
