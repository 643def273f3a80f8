"""Several processes that train one adapter: the losses of one process, of all with the base whole in each, and of all
with the packed weights spread over them, and what each of them holds.

    python benchmarks/finetune_ranks.py MODEL PAIRS.jsonl [--processes 2] [--device cuda] [--format nf4-dq]

starts itself under torchrun. It fails where losses differ by more than the order of sums can explain, or where a
process of the last run holds more than its share of the packed bytes (and a twentieth: rows are not cut in two).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import whit
from whit.errors import TrainingError
from whit.modules import QuantizedLinear
from whit.training.ranks import Ranks
from whit.tuning import prepare_tuning
from whit.tuning.run import build_loop

from harness import RESULTS, machine, markdown

HEADER = ("run", "losses", "tokens/s", "packed MB a process", "held GB a process", "peak GB a process")


def packed_bytes(model: Any) -> int:
    """What this process holds of the packed weights between steps."""
    found = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                found += tensor.to_local().nbytes if hasattr(tensor, "to_local") else tensor.nbytes
    return found


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run, by this process and, where they share it, the others."""
    cuda = args.device == "cuda"
    tuning = whit.Tuning(
        args.format, rank=16, alpha=16, dropout=0.05, steps=args.steps, batch=args.batch, accumulate=args.accumulate,
        context=args.context, learning_rate=5e-4, holdout=0.0, dtype=args.dtype,
    )  # fmt: skip
    ranks = Ranks() if name == "alone" else Ranks.here()
    job = prepare_tuning(args.model, args.data, Path("unused"), tuning, None, whit.Options(device=args.device))
    loop, _ = build_loop(replace(job, tuning=replace(tuning, shard=name == "sharded")), ranks)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    entries = [loop.step(number) for number in range(len(job.work.steps))]
    held = torch.cuda.memory_allocated() if cuda else 0
    found = {
        "run": name,
        "losses": [e["loss"] for e in entries],
        "tokens_per_second": sorted(e["tokens_per_second"] for e in entries)[len(entries) // 2],
        "packed_bytes": packed_bytes(loop.model),
        "held_bytes": held,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    keys = ("packed_bytes", "held_bytes", "peak_bytes")
    return found | {key: [other[key] for other in gathered] for key in keys}


def check(rows: list[dict[str, Any]], processes: int, dtype: str) -> None:
    """AssertionError where the runs are not one."""
    alone, both, *sharded = rows
    tolerance = 1e-4 if dtype == "float32" else 5e-3
    for row in (both, *sharded):
        for one, other in zip(alone["losses"], row["losses"], strict=True):
            assert abs(one - other) <= tolerance * one, (row["run"], one, other)
    whole = both["packed_bytes"][0]
    assert whole == alone["packed_bytes"][0]
    for row in sharded:
        assert max(row["packed_bytes"]) <= 1.05 * whole / processes, (row["packed_bytes"], whole)


def work(args: argparse.Namespace) -> None:
    """What each process does."""
    rank, began = int(os.environ["LOCAL_RANK"]), time.perf_counter()
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rows, said = [train(name, args) for name in ("alone", "both")], ""
    try:
        rows.append(train("sharded", args))
    except TrainingError as error:  # a torch that cannot leave adapters whole
        said = str(error)
    if rank == 0:
        check(rows, dist.get_world_size(), args.dtype)
        body = []
        for row in rows:
            packed = " ".join(f"{b / 1e6:.2f}" for b in row["packed_bytes"])
            held, peak = (" ".join(f"{b / 1e9:.2f}" for b in row[key]) for key in ("held_bytes", "peak_bytes"))
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
            body.append([row["run"], losses, f"{row['tokens_per_second']:,.0f}", packed, held, peak])
        setting = {key: str(value) for key, value in vars(args).items() if key not in ("model", "data", "out")}
        found = {"machine": machine(), "model": Path(args.model).name, "setting": setting, "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(HEADER, body) + "\n")
        print(markdown(HEADER, body))
        print(said or "all three runs were made")
        print(f"all checks passed, {time.perf_counter() - began:.0f} s", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--format", default="nf4-dq")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune_ranks.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    raise SystemExit(subprocess.run([*start, __file__, *sys.argv[1:], "--worker"], check=False).returncode)


if __name__ == "__main__":
    main()
