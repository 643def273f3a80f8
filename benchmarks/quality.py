"""What each format and method costs on a real model: python benchmarks/quality.py MODEL TEXT [--device cuda]

Every candidate is quantized in a process of its own with two threads (its seconds and peak memory are of that), and
evaluated against the original on the whole text at one context: perplexity, KL divergence with its 95 % interval,
top-1 agreement, bits per weight of the whole file. Rows that an earlier run finished are kept.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from whit.calibration import Calibration
from whit.evaluation import EvaluationOptions
from whit.report.candidates import parse_entrant
from whit.report.comparison import Row, markdown
from whit.report.runs import in_process
from whit.report.work import Order

import harness

PLAIN = ("int8", "int6-g64", "int5-g64", "nf4", "nf4-dq", "fp4", "int4-channel", "int4-g192", "int4-g64", "int4-g32")
LOW = ("int3-g64", "int2-g32", "int4-g64-asym", "int4-g64-asym-fz", "int3-g64-asym", "int3-g64-asym-fz")
LOWEST = ("int2-g32-asym", "int2-g32-asym-fz", "fp8")
METHODS = ("rtn", "clip", "hqq")
CALIBRATED = ("nf4-dq", "int4-channel", "int4-g64", "int4-g64-asym", "int3-g64", "int3-g64-asym", "int2-g32-asym")


def run(args: argparse.Namespace, candidate: str) -> dict[str, Any]:
    """One candidate, made and measured by the processes of `whit compare`."""
    evaluation = EvaluationOptions(text=args.text, context=args.context, device=args.device, max_tokens=args.max_tokens)
    entrant = parse_entrant(candidate)
    calibration = Calibration(args.calibration, samples=128, context=args.context, seed=0)
    place = str(Path(args.scratch) / entrant.folder)
    order = Order(args.model, entrant, place, evaluation, None, calibration, threads=2)
    made = in_process("make", order) if entrant.kind == "whit" else {"seconds": 0.0, "peak_memory_bytes": 0}
    found = made if "error" in made else in_process("measure", order)
    if "error" in found:
        raise SystemExit(f"{candidate}: {found['error']}")
    print(candidate, "done", flush=True)
    kl = found["kl"]
    return Row(
        entrant.method or "rtn", entrant.format, found["bits_per_weight"], found["size_bytes"], found["perplexity"],
        kl["mean"], kl["ci95"], kl["p99"], found["top1_agreement"], made["seconds"], made["peak_memory_bytes"],
    ).to_json()  # fmt: skip


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
    args = parser.parse_args()

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
