"""Perplexity with quantized activations on a real model: python benchmarks/activations.py MODEL TEXT [--tokens 16384]

Every row is made by `whit.quantize` from the same calibration and read by `from_pretrained`; all rows score the same
tokens, in float32. The change of each against the original comes with its 95 % interval over windows' tokens (paired).
With `--valid` a second text is scored too: the one by which to choose. Rows that an earlier run with the same settings
finished are kept.
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
from whit.pipeline import quantize
from whit.pipeline.job import Options
from whit.recipe import Recipe

import harness

DYNAMIC_DOWN = [("*down_proj", "w8a8")]  # a scale per token where few tokens hold all that is large
FLOAT_DOWN = [("*down_proj", "int8-g64")]  # in groups, and so without quantized activations
FIXED = {"name": "smoothquant", "alpha": 0.5}
# 64 columns at a time rotated: weights in the file, inputs as they come
TURNED = [("*", "int8+h64")]
TURNED_DOWN = [("*", "int8"), ("*down_proj", "int8+h64")]
TURNED_STATIC = [("*", "w8a8-static+h64"), ("*down_proj", "w8a8+h64")]
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
    "SmoothQuant, GPTQ, W8A8 dynamic": {"method": "smoothquant+gptq"},
    "W8A8 dynamic, rotated": {"rules": [("*", "w8a8+h64")]},
    "LLM.int8(), rotated": {"rules": [("*", "llm.int8+h64")]},
    "SmoothQuant, W8A8 dynamic, down_proj rotated": {"method": "smoothquant", "rules": TURNED_DOWN},
    "SmoothQuant, W8A8 dynamic, rotated": {"method": "smoothquant", "rules": TURNED},
    "SmoothQuant, W8A8 static, down_proj dynamic, rotated": {"method": "smoothquant", "rules": TURNED_STATIC},
    "SmoothQuant, W8A8 static, MSE, down_proj dynamic, rotated": {
        "method": "smoothquant", "activations": "int8-static-mse", "rules": [*TURNED, ("*down_proj", "w8a8+h64")],
    },
    "W8A8 static, down_proj dynamic, rotated": {"rules": TURNED_STATIC},
    "SmoothQuant, GPTQ, W8A8 dynamic, rotated": {"method": "smoothquant+gptq", "rules": TURNED},
    "SmoothQuant, LLM.int8(), rotated": {"method": "smoothquant", "rules": [("*", "llm.int8+h64")]},
    "W8A8 static, rotated": {"rules": [("*", "w8a8-static+h64")]},
    "LLM.int8(), down_proj rotated": {"rules": [("*", "llm.int8"), ("*down_proj", "llm.int8+h64")]},
    "SmoothQuant, W8A8 static, o_proj and down_proj dynamic, rotated": {
        "method": "smoothquant", "rules": [*TURNED_STATIC, ("*o_proj", "w8a8+h64")],
    },
    "W8A8 dynamic in q, k and v alone": {"rules": [("*[qkv]_proj", "w8a8")]},
    "W8A8 dynamic in o_proj alone": {"rules": [("*o_proj", "w8a8")]},
    "W8A8 dynamic in gate and up alone": {"rules": [("*gate_proj", "w8a8"), ("*up_proj", "w8a8")]},
    "W8A8 dynamic in down_proj alone": {"rules": [("*down_proj", "w8a8")]},
    "SmoothQuant, LLM.int8()": {"method": "smoothquant", "rules": [("*", "llm.int8")]},
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
    parser.add_argument("--valid", help="another text, scored beside it")
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
    texts = [args.text] if args.valid is None else [args.text, args.valid]
    windows = [windows_of(args, text) for text in texts]
    path = harness.RESULTS / f"{args.name}.json"
    settings = {k: getattr(args, k) for k in ("calibration", "samples", "tokens", "context")}
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before.get("rows", {}) if before.get("settings") == settings else {}
    Path(args.scratch).mkdir(exist_ok=True)
    exact = [losses(str(args.model), some, args.device) for some in windows]
    for label in list(ROWS)[: args.rows]:
        if label not in rows and time.monotonic() - start < args.seconds:
            folder = made(args, label) if ROWS[label] else str(args.model)
            found = [losses(folder, some, args.device) for some in windows]
            rows[label] = measured(found[0], exact[0])
            if args.valid is not None:
                rows[label] |= {f"valid_{key}": value for key, value in measured(found[1], exact[1]).items()}
            print(label, rows[label], flush=True)
            write(rows, settings, args)


def windows_of(args: argparse.Namespace, text: str) -> Tensor:
    """The first tokens of a text, int64 (windows, context)."""
    tokens = tokenize(read_text(Path(text)), load_tokenizer(args.model), args.tokens, text)
    return cut_windows(tokens, args.context)


def measured(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Of two losses of the same tokens: perplexity, mean change, and half of its 95 % interval."""
    change = (found - exact).flatten()
    half = 1.96 * float(change.std()) / math.sqrt(len(change))
    return {"perplexity": float(found.mean().exp()), "change": float(change.mean()), "half": half}


def write(rows: dict[str, dict[str, float]], settings: dict[str, object], args: argparse.Namespace) -> None:
    """The table of all rows that are done."""
    table = []
    for label in (label for label in ROWS if label in rows):
        row = rows[label]
        table.append((label, f"{row['perplexity']:.3f}", said(row) if ROWS[label] else "", said(row, "valid_")))
    note = (
        f"\n{Path(args.model).name}, the first {args.tokens} tokens of {Path(args.text).name} in windows of "
        f"{args.context}, float32 on a {args.device}; static scales, SmoothQuant and GPTQ from {args.samples} "
        f"windows of 512 tokens of {Path(args.calibration).name}. The change is of the same tokens, with the 95 % "
        "interval of its mean."
    )
    if args.valid is not None:
        note += f" Valid: the first {args.tokens} tokens of {Path(args.valid).name}, the text to choose by."
    result = {"machine": harness.machine(), "settings": settings, "rows": rows}
    harness.save(args.name, result, harness.markdown(("", "perplexity", "change", "valid"), table) + "\n" + note)


def said(row: dict[str, float], text: str = "") -> str:
    """The change in percent, where it was measured."""
    if f"{text}change" not in row or not row[f"{text}half"]:
        return ""
    return f"{100 * math.expm1(row[f'{text}change']):+.2f} ± {100 * row[f'{text}half']:.2f} %"


if __name__ == "__main__":
    main()
