"""Collect what ships: weights, tokenizer and texts, one JSON of every figure, and the loss curve.

    python recipes/shipped_model/publish.py --data build/shipped_model --model build/shipped_model/model \\
        --package src/whit/data
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from scoring import token_losses
from transformers import AutoTokenizer, LlamaForCausalLM

SLICE_TOKENS = 4 * 2048  # of the held-out text: what the test suite scores again
COLOURS = {"train": "#888888", "wiki_valid": "#1f77b4", "heldout": "#d62728"}
LABELS = {"train": "training batches", "wiki_valid": "Wikipedia, validation", "heldout": "held-out novel"}


def score_slice(folder: Path, data: Path) -> dict:
    """Bits per byte of the first tokens of the held-out novel, by the model on the CPU and by the 5-gram."""
    stream = np.load(data / "heldout.npy")[: SLICE_TOKENS + 1]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    text_bytes = len(tokenizer.decode(stream[1:].tolist()).encode())
    nats = {
        "model": float(token_losses(model, stream, model.config.max_position_embeddings).double().sum()),
        "kneser_ney": float(np.load(data / "heldout.kneser_ney.npy")[:SLICE_TOKENS].astype(np.float64).sum()),
    }
    figures = {name: round(value / math.log(2) / text_bytes, 4) for name, value in nats.items()}
    return {"tokens": SLICE_TOKENS, "bytes": text_bytes, "bits_per_byte": figures}


def loss_curve(curve: list[dict], baselines: dict[str, float]) -> str:
    """An SVG of nats per token against steps; dashed: the 5-gram's loss on the same text."""
    width, height, left, top, low, high = 640, 360, 50, 20, 2.5, 7.5
    last = curve[-1]["step"]

    def x(step: float) -> float:
        return left + (width - left - 170) * step / last

    def y(loss: float) -> float:
        return top + (height - top - 45) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for loss in range(math.ceil(low), math.floor(high) + 1):
        parts.append(f'<path d="M{x(0)} {y(loss):.1f}H{x(last)}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 18}" y="{y(loss) + 4:.1f}">{loss}</text>')
    for step in range(0, last + 1, 1000):
        parts.append(f'<text x="{x(step):.1f}" y="{height - 26}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{x(last / 2):.1f}" y="{height - 8}" text-anchor="middle">step</text>')
    parts.append(f'<text x="12" y="{height / 2}" transform="rotate(-90 12 {height / 2})">nats per token</text>')
    for row, (name, colour) in enumerate(COLOURS.items()):
        points = " ".join(f"{x(point['step']):.1f},{y(point[name]):.1f}" for point in curve if point[name] < high)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x(last) + 12:.1f}" y="{top + 20 * row + 12}" fill="{colour}">{LABELS[name]}</text>')
        if name in baselines:
            level = f"M{x(0)} {y(baselines[name]):.1f}H{x(last)}"
            parts.append(f'<path d="{level}" stroke="{colour}" stroke-dasharray="6 4"/>')
    parts.append(f'<text x="{x(last) + 12:.1f}" y="{top + 72}">dashed: the 5-gram</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py and kneser_ney.py wrote")
    parser.add_argument("--model", type=Path, required=True, help="what train.py wrote")
    parser.add_argument("--package", type=Path, required=True, help="gets model/ and text/")
    args = parser.parse_args()
    model, text = args.package / "model", args.package / "text"
    for folder in (model, text):
        folder.mkdir(parents=True, exist_ok=True)

    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(args.model / name, model / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.data / "tokenizer" / name, model / name)
    for name in ("heldout.txt", "calibration.txt"):
        shutil.copyfile(args.data / name, text / name)

    record = json.loads((args.model / "training.json").read_text())
    record["data"] = json.loads((args.data / "sizes.json").read_text())
    record["kneser_ney"] = json.loads((args.data / "kneser_ney.json").read_text())
    record["heldout_slice"] = score_slice(args.model, args.data)
    (model / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    baselines = {name: score["loss"] for name, score in record["kneser_ney"]["scores"].items()}
    (model / "loss_curve.svg").write_text(loss_curve(record["curve"], baselines))
    print(json.dumps(record["heldout_slice"], indent=1))


if __name__ == "__main__":
    main()
