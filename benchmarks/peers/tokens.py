"""The calibration tokens that all peers see: python benchmarks/peers/tokens.py MODEL TEXT DIR [--seeds 0,1,2]

Writes DIR/seedN.safetensors with `tokens` int32 (samples, context) and their SHA-256, drawn by whit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from whit.calibration import Calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        drawn = Calibration(args.text, args.samples, args.context, seed).tokens(tokenizer)
        path = args.folder / f"seed{seed}.safetensors"
        save_file({"tokens": drawn.tokens.to(torch.int32)}, path, {"sha256": drawn.sha256})
        print(path, tuple(drawn.tokens.shape), drawn.sha256)


if __name__ == "__main__":
    main()
