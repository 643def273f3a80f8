"""Peak memory of calibrated quantization on a CPU: python benchmarks/calibrated_peak.py [--blocks 28] [--samples 8]

A Llama of 3.2 B parameters (Llama-3.2-3B's shape) of random weights is written to a scratch folder, a shard a block,
and `whit quantize --method gptq` runs on it in a process of its own, whose peak (VmHWM) is what is reported. Few blocks
with many samples show what calibration holds; all blocks with few samples show that nothing grows with the depth.
Rows are kept in results/calibrated_peak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import LlamaConfig

from random_model import write_random

from harness import RESULTS

GB = 1e9
CASE = ("blocks", "samples", "context")


def write_model(folder: Path, blocks: int, tokenizer: Path) -> int:
    """A random bfloat16 model of `blocks` decoder blocks beside `tokenizer`'s files; returns its parameters."""
    config = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=blocks, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16",
    )  # fmt: skip
    parameters = write_random(folder, config, 250_000_000)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
    return parameters


def _status(child: subprocess.Popen[str], key: str) -> int:
    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _watch(child: subprocess.Popen[str], minutes: float) -> list[dict[str, Any]]:
    """For each unit, as the process says that it is done: seconds, the highest VmHWM since the last, what stays."""
    units: list[dict[str, Any]] = []
    begin = start = time.monotonic()
    assert child.stderr is not None
    for line in child.stderr:
        if not (found := re.match(r"\d+/\d+ (\S+)", line)):
            print(line, end="", file=sys.stderr)
            continue
        peak, left, now = _status(child, "VmHWM"), _status(child, "RssAnon"), time.monotonic()
        Path(f"/proc/{child.pid}/clear_refs").write_text("5")  # VmHWM counts from here
        units.append({"unit": found[1], "seconds": now - start, "peak_gb": peak / GB, "anonymous_after_gb": left / GB})
        print(units[-1], file=sys.stderr)
        start = now
        if now - begin > 60 * minutes:
            child.terminate()
            break
    child.wait()
    return units


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Write, quantize, and read the child's peaks."""
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
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        units = _watch(child, args.minutes)
        seconds = time.monotonic() - start
        if child.returncode and seconds < 60 * args.minutes:
            raise SystemExit(f"whit ended with {child.returncode}")
    row = {"blocks": args.blocks, "samples": args.samples, "context": args.context, "parameters": parameters}
    peak = max(unit["peak_gb"] for unit in units)
    done = sum(".layers." in unit["unit"] for unit in units)
    return row | {"blocks_done": done, "peak_gb": peak, "minutes": seconds / 60, "units": units}


def block_peaks(row: dict[str, Any]) -> str:
    """The lowest and the highest peak of the blocks behind the first, which holds the embedding too."""
    peaks = [unit["peak_gb"] for unit in row.get("units", ()) if ".layers." in unit["unit"]][1:]
    return f"{min(peaks):.2f} to {max(peaks):.2f}" if peaks else ""


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| blocks | parameters | tokens | peak GB | each block behind the first | minutes | |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---|")
    for r in rows:
        tokens, done = f"{r['samples']} x {r['context']}", r.get("blocks_done", r["blocks"])
        blocks = done if done == r["blocks"] else f"{done} of {r['blocks']}"
        lines.append(
            f"| {blocks} | {r['parameters'] / GB:.2f} B | {tokens} | {r['peak_gb']:.2f} | {block_peaks(r)} "
            f"| {r['minutes']:.0f} | {r.get('note', '')} |"
        )
    lines.append("\nGPTQ int4-g128 on a CPU of a random Llama of Llama-3.2-3B's shape; VmHWM of the whole process.")
    lines.append("With the text grow the inputs of a block, 6,144 bytes a token: 1.61 GB for 128 x 2048 tokens.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="a model folder, for its tokenizer")
    parser.add_argument("text", type=Path, help="calibration text")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--minutes", type=float, default=1e6, help="end the run after the unit in which they pass")
    args = parser.parse_args()
    row = measure(args)
    file = RESULTS / "calibrated_peak.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows = [old for old in rows if [old[key] for key in CASE] != [row[key] for key in CASE]] + [row]
    rows.sort(key=lambda row: [row[key] for key in CASE])
    file.write_text(json.dumps(rows, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
