"""Perplexity with keys and values in few bits: python benchmarks/kv_cache.py MODEL TEXT [--tokens 8192]

Windows of the text are read in chunks, as a long prompt or a chat is: a chunk's own keys are exact while it is read,
all before it come out of the cache. The change against a cache in the model's type is that of the same tokens, with
its 95 % interval. Bytes are those of the last window's cache.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import logging

import whit
from whit.data import resolve_text
from whit.evaluation.perplexity import token_losses
from whit.evaluation.text import cut_windows, read_text, tokenize
from whit.integrations.loading import load_causal_lm, load_tokenizer

import harness

ROWS = (
    ("int8", 0), ("int4-g32", 0), ("int4-g32", 128), ("int4-g32-asym", 0), ("int4-g32-asym", 128), ("int2-g32-asym", 0),
)  # fmt: skip


def score(model: Any, windows: Tensor, chunk: int, make: Any) -> tuple[Tensor, int]:
    """-log p of every predicted token, float64, and the bytes of the last cache."""
    losses, size = [], 0
    for window in windows.to(model.device):
        cache, logits = make(), []
        with torch.inference_mode():
            for part in window[None].split(chunk, dim=1):
                logits.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits[0])
        losses.append(token_losses(torch.cat(logits)[:-1], window[1:]))
        size = getattr(cache, "nbytes", 0) or sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return torch.cat(losses), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="kv_cache")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_causal_lm(args.model, device=args.device, dtype="float32" if args.device == "cpu" else "auto")
    text = read_text(Path(resolve_text(args.text)))
    windows = cut_windows(tokenize(text, load_tokenizer(args.model), args.tokens, args.text), args.context)
    exact, size = score(model, windows, args.chunk, lambda: DynamicCache(config=model.config))
    itemsize = next(model.parameters()).element_size()
    plain = {"perplexity": float(exact.mean().exp()), "bits": 8.0 * itemsize}
    rows: dict[str, dict[str, float]] = {"the model's type": plain}
    for format, recent in ROWS:
        make = partial(whit.QuantizedCache, model.config, format, recent)
        found, taken = score(model, windows, args.chunk, make)
        change, label = found - exact, f"{format}, {recent} recent" if recent else format
        rows[label] = {
            "perplexity": float(found.mean().exp()), "change": float(change.mean()),
            "half": 1.96 * float(change.std()) / math.sqrt(len(change)), "bits": 8 * itemsize * taken / size,
        }  # fmt: skip
        print(label, rows[label], flush=True)
    table = [
        (
            label, f"{row['bits']:.2f}", f"{row['perplexity']:.3f}",
            f"{100 * math.expm1(row['change']):+.2f} ± {100 * row['half']:.2f} %" if "change" in row else "",
        )
        for label, row in rows.items()
    ]  # fmt: skip
    note = (
        f"\n{Path(args.model).name}, the first {args.tokens} tokens of {Path(args.text).name} in windows of "
        f"{args.context}, read in chunks of {args.chunk}. Bits are those of a key's or value's element, all counted."
    )
    settings = {**vars(args), "model": Path(args.model).name, "text": Path(args.text).name}
    result = {"machine": harness.machine(), "settings": settings, "rows": rows}
    harness.save(args.name, result, harness.markdown(("cache", "bits", "perplexity", "change"), table) + "\n" + note)


if __name__ == "__main__":
    main()
