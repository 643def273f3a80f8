"""What each format and method costs on a real model: python benchmarks/quality.py MODEL TEXT [--device cuda]

Every candidate is quantized in a process of its own with two threads (its seconds and peak memory are of that), and
evaluated against the original on the whole text at one context: perplexity, KL divergence with its 95 % interval,
top-1 agreement, bits per weight of the whole file. Rows that an earlier run finished are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import harness

PLAIN = ("int8", "int6-g64", "int5-g64", "nf4", "nf4-dq", "fp4", "int4-channel", "int4-g192", "int4-g64", "int4-g32")
LOW = ("int3-g64", "int2-g32", "int4-g64-asym", "int4-g64-asym-fz", "int3-g64-asym", "int3-g64-asym-fz")
LOWEST = ("int2-g32-asym", "int2-g32-asym-fz", "fp8")
METHODS = ("rtn", "clip", "hqq")
CALIBRATED = ("nf4-dq", "int4-channel", "int4-g64", "int4-g64-asym", "int3-g64", "int3-g64-asym", "int2-g32-asym")


def worker(args: argparse.Namespace) -> None:
    """Measure one candidate and print its row."""
    import torch

    from whit.calibration import Calibration
    from whit.evaluation import EvaluationOptions
    from whit.job import Options
    from whit.recipe import Recipe
    from whit.report.comparison import Candidate, measure

    torch.set_num_threads(2)
    options = EvaluationOptions(text=args.text, context=args.context, device=args.device, max_tokens=args.max_tokens)
    candidate, scratch = Candidate.parse(args.candidate), Path(args.scratch)
    needs_stats = Recipe(candidate.method).needs_stats
    quantizing = Options(device=args.device if needs_stats else "cpu")
    calibration = Calibration(args.calibration, samples=128, context=args.context, seed=0)
    row = measure(args.model, candidate, scratch, options, quantizing=quantizing, calibration=calibration)
    print(json.dumps(row.to_json()))


def run(args: argparse.Namespace, candidate: str) -> dict[str, object]:
    """One candidate in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--candidate", candidate]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{candidate}: {done.stderr.strip().splitlines()[-1]}")
    print(candidate, "done", flush=True)
    row: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", default="whit:text")
    parser.add_argument("--name", default="quality")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--scratch", default="/tmp/whit-quality")
    parser.add_argument("--candidates", default="")
    parser.add_argument("--candidate", default="")
    args = parser.parse_args()
    if args.candidate:
        worker(args)
        return
    from whit.report.comparison import Row, markdown

    wanted = args.candidates.split(",") if args.candidates else candidates()
    harness.RESULTS.mkdir(exist_ok=True)
    path = harness.RESULTS / f"{args.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before.get("rows", {})
    todo = [c for c in wanted if c not in rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        for candidate, row in zip(todo, pool.map(partial(run, args), todo), strict=True):
            rows[candidate] = row
            path.write_text(json.dumps({"rows": rows}))
    kept = [rows[c] for c in wanted]
    note = f"\n{Path(args.model).name}, {Path(args.text).name}, context {args.context}; "
    note += "KL in nats per token against bf16; seconds to quantize with 2 threads. gptq: calibrated on 128 windows "
    note += "of 2048 tokens of other Wikipedia articles, with its defaults, quantized on the GPU, six runs at once."
    machine = harness.machine() if todo else before["machine"]
    result = {"machine": machine, "text": Path(args.text).name, "context": args.context, "rows": rows}
    harness.save(args.name, result, markdown([Row(**row) for row in kept]) + "\n" + note)


def candidates() -> list[str]:
    """All rows of the table, in its order."""
    free = [f"{m}:{f}" for f in (*PLAIN, *LOW, *LOWEST) for m in METHODS]
    return ["rtn:bf16", *free, *(f"gptq:{f}" for f in CALIBRATED)]


if __name__ == "__main__":
    main()
