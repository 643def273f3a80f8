"""Seconds of GPTQ int4-g64, whit beside its peers: python benchmarks/peers/speed.py MODEL TOKENS --environments DIR

TOKENS is the folder that tokens.py wrote; --samples and --tokens-each say how much of it is used. Every run is a
process of its own with the same number of threads; they take turns. The seconds are of the quantizing call alone;
processor seconds, summed over threads, do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from catalogue import PEERS, ROWS
from run import SOURCE, Child, folder
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

COMPARED = ("whit-gptq", "gptqmodel", "llmcompressor-gptq")


def cut_tokens(args: argparse.Namespace, place: Path) -> None:
    """The first samples, shortened."""
    from quantizing import read_tokens

    tokens, sha256 = read_tokens(args.tokens, 0)
    part = tokens[: args.samples, : args.tokens_each].int().contiguous()
    save_file({"tokens": part}, place / "seed0.safetensors", {"sha256": f"cut of {sha256}"})


def one(peer: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """One run in a new process."""
    found = PEERS[peer]
    path = args.environments / found.environment if found.environment else SOURCE
    paths = [path, *[p for p in (args.environments / "shared",) if p.is_dir()]]
    child = Child("quantizing", paths, place / f"{peer}.log", args.threads)
    task = {"model": str(args.model), "tokens": str(place), "out": str(place / "out"), "device": args.device}
    task |= {"row": vars(ROWS[0]), "adapter": found.adapter, "options": dict(found.options), "seed": 0}
    try:
        return child.ask(task, args.limit)
    finally:
        child.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=folder)
    parser.add_argument("tokens", type=folder)
    parser.add_argument("--environments", type=folder, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens-each", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=1e6)
    parser.add_argument("--peers", default=",".join(COMPARED))
    parser.add_argument("--save", help="a name in benchmarks/results")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in args.peers.split(",")}
    for _ in range(args.rounds):
        for peer, results in runs.items():
            with tempfile.TemporaryDirectory() as scratch:
                cut_tokens(args, Path(scratch))
                results.append(one(peer, args, Path(scratch)))
            print(peer, results[-1].get("error") or f"{results[-1]['seconds']:.1f} s", flush=True)
    tokens = f"{args.samples} x {args.tokens_each} tokens"
    page = f"{table(runs)}\n\nint4-g64, {tokens}, {args.threads} threads, {args.device}"
    if args.save:
        harness.save(args.save, {"machine": harness.machine(), "runs": runs}, page)
    else:
        print(page)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Median seconds and their range; processor seconds and their ratio to the first row's."""
    lines, first = [], None
    for peer, results in runs.items():
        seconds = [r["seconds"] for r in results if "error" not in r]
        if not seconds:
            lines.append([peer, results[0]["error"], "", "", "", ""])
            continue
        took = harness.spread(seconds)
        busy = harness.spread([r["processor_seconds"] for r in results if "error" not in r])["median"]
        first = first or busy
        peak = max(r["peak_mb"] for r in results if "error" not in r)
        spread = f"{took['min']:.1f} to {took['max']:.1f}"
        lines.append([peer, f"{took['median']:.1f}", spread, f"{busy:.1f}", f"{busy / first:.2f}", f"{peak:.0f}"])
    return harness.markdown(["quantizer", "seconds", "range", "processor seconds", "ratio", "peak MB"], lines)


if __name__ == "__main__":
    main()
