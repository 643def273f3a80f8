"""What an adapter learns on quantized weights: held-out response loss by format, and by how the adapter begins.

    python benchmarks/finetune_quality.py MODEL PAIRS.jsonl [--device cuda] [--minutes 10]

LoRA on bfloat16 weights is the goal; each other row quantizes MODEL on the way in and trains the same adapters (r = 16
on all linears) on the same pairs in the same order. A tenth of the pairs is held out; the rest is gone through until
2,000 pairs were seen. A row such as `int2-g32+data` begins with factors that make up for what quantization lost
(`whit.initialize_adapter`), `gptq:int2-g32+data` with codes and factors that were chosen for each other, calibrated on
the pairs that are trained on. `gap` is the loss above LoRA on bfloat16; `closed` the share of the gap of the format to
nearest, with a plain start, that a row does not have.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import whit
from whit.checkpoint.places import work_path
from whit.training.ranks import Ranks
from whit.tuning import prepare_tuning
from whit.tuning.base import make_base
from whit.tuning.run import build_loop

from harness import RESULTS, machine, markdown

ROWS = (
    "bf16", "nf4-dq", "int4-g64", "int4-g64+loftq", "int4-g64+data", "int3-g64", "int2-g32", "int2-g32+loftq",
    "int2-g32+data", "gptq:int2-g32", "gptq:int2-g32+data", "refine:int2-g32+data", "gptq:int4-g64+data",
)  # fmt: skip
PAIRS = 2000  # seen in a run
HELD_OUT = 0.1


def train(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Losses before, on the way and after."""
    named, _, start = row.partition("+")
    method, _, format = named.rpartition(":")
    tuning = whit.Tuning(
        format=None if format == "bf16" else format, method=None if format == "bf16" else method or args.method,
        init=start or "default", rank=16, alpha=args.alpha, dropout=0.05, steps=args.steps,
        epochs=args.pairs / (len(args.data.read_text().splitlines()) * (1 - HELD_OUT)), batch=4, accumulate=2,
        context=args.context, learning_rate=args.learning_rate, checkpointing=False, dtype=args.dtype, holdout=HELD_OUT,
        evaluate_every=args.evaluate_every,
    )  # fmt: skip
    options = whit.Options(seed=args.seed, device=args.device)
    with TemporaryDirectory() as folder:
        job = prepare_tuning(args.model, args.data, Path(folder) / "out", tuning, None, options)
        began = time.perf_counter()
        work_path(job.out).mkdir()
        make_base(job, Ranks())
        loop, _ = build_loop(job, Ranks())
    entry: dict[str, Any] = {
        "row": row,
        "steps": len(job.work.steps),
        "notes": list(job.notes),
        "ready_seconds": time.perf_counter() - began,
    }
    began = time.perf_counter()
    log = [e for entries in loop.steps(0) for e in entries]
    scores = {e["step"]: e["held_out_loss"] for e in log if "held_out_loss" in e}
    losses = [e["loss"] for e in log if "loss" in e]
    tail = losses[-max(len(losses) // 5, 1) :]
    return entry | {
        "held_out": scores, "before": min(scores.items())[1], "after": max(scores.items())[1],
        "training_loss_last_fifth": sum(tail) / len(tail), "seconds": time.perf_counter() - began,
        "held_out_examples": len(job.work.held_out),
        "held_out_tokens": sum(e.targets for e in job.work.held_out),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Losses, and gaps to the first row."""
    done = {row["row"]: row for row in rows if "after" in row}
    goal = done.get("bf16")
    body = []
    for row in rows:
        if "error" in row:
            body.append([row["row"], row["error"], "", "", "", ""])
            continue
        gap = row["after"] - goal["after"] if goal else float("nan")
        plain = done.get(row["row"].partition("+")[0].rpartition(":")[2])
        closed = ""
        if goal and plain and plain is not row and plain["after"] > goal["after"]:
            closed = f"{100 * (plain['after'] - row['after']) / (plain['after'] - goal['after']):.0f} %"
        relative = f"{100 * gap / goal['after']:+.2f} %" if goal else ""
        body.append([row["row"], f"{row['before']:.4f}", f"{row['after']:.4f}", f"{gap:+.4f}", relative, closed])
    return markdown(["row", "before", "after", "gap", "relative", "closed"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--evaluate-every", type=int)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--method", help="how weights are quantized, without data: rtn, clip or hqq")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row is begun after these")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune_quality.json")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    rows: list[dict[str, Any]] = []
    for name in args.rows:
        rows.append(train(name, args) if time.monotonic() < end else {"row": name, "error": "no time left"})
        print({k: v for k, v in rows[-1].items() if k != "held_out"}, flush=True)
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("model", "data", "out")}
        found = {"machine": machine(), "model": Path(args.model).name, "data": args.data.name, "settings": settings}
        args.out.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    args.out.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
