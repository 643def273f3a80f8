"""Peak memory of calibrated quantization on a CPU: python benchmarks/calibrated_peak.py [--blocks 28] [--samples 8]

A Llama of 3.2 B parameters (Llama-3.2-3B's shape) of random weights is written to a scratch folder, a shard per block,
and `whit quantize --method gptq` runs on it in a process of its own, whose peak (VmHWM) is what is reported. Few blocks
with many samples show what calibration holds; all blocks with few samples show that nothing grows with the depth.
Rows are kept in results/calibrated_peak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from harness import RESULTS

GB = 1e9


def write_model(folder: Path, blocks: int, tokenizer: Path) -> float:
    """A random bfloat16 model of `blocks` decoder blocks beside `tokenizer`'s files; returns its parameters."""
    config = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=blocks, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    del shapes["lm_head.weight"]  # tied
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        shard = f"block-{name.split('.')[2]}" if ".layers." in name else "rest"
        shards.setdefault(f"{shard}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        weights = {n: _random(s, generator) for n, s in names.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return float(sum(shape.numel() for shape in shapes.values()))


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def _watch(child: subprocess.Popen[bytes]) -> int:
    """The highest VmHWM that was seen, in bytes: it only grows, and is read until the process ends."""
    peak = 0
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:
            break
        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.2)
    child.wait()
    return peak


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Write, quantize, and read the child's peak."""
    with TemporaryDirectory(dir=args.scratch) as scratch:
        model, out = Path(scratch, "model"), Path(scratch, "out")
        model.mkdir()
        parameters = write_model(model, args.blocks, args.tokenizer)
        command = ["quantize", str(model), str(out), "--format", "int4-g128", "--method", "gptq"]
        command += ["--calibration", str(args.text), "--samples", str(args.samples), "--context", str(args.context)]
        source = str(Path(__file__).resolve().parents[1] / "src")
        start = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "whit", *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.DEVNULL,
        )
        peak = _watch(child)
        seconds = time.monotonic() - start
        if child.returncode:
            raise SystemExit(f"whit ended with {child.returncode}")
    row = {"blocks": args.blocks, "samples": args.samples, "context": args.context, "parameters": parameters}
    return row | {"peak_gb": peak / GB, "minutes": seconds / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="a model folder, for its tokenizer")
    parser.add_argument("text", type=Path, help="calibration text")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    row = measure(args)
    file = RESULTS / "calibrated_peak.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows = [old for old in rows if (old["blocks"], old["samples"]) != (args.blocks, args.samples)] + [row]
    rows.sort(key=lambda row: row["blocks"])
    file.write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| blocks | parameters | tokens | peak GB | minutes |", "|---:|---:|---:|---:|---:|"]
    for r in rows:
        tokens = f"{r['samples']:.0f} x {r['context']:.0f}"
        lines.append(
            f"| {r['blocks']:.0f} | {r['parameters'] / GB:.2f} B | {tokens} | {r['peak_gb']:.2f} | {r['minutes']:.0f} |"
        )
    lines.append("\nGPTQ int4-g128 on a CPU of a random Llama of Llama-3.2-3B's shape; VmHWM of the whole process.")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
