"""Quantization after training against quantization-aware training: one table for a model, one process for a chain.

    python benchmarks/qat.py --model smollm2-135m-fp --shared FOLDER --out OUT --prepare     # texts to OUT/tokens
    python benchmarks/qat.py --model smollm2-135m-fp --shared FOLDER --out OUT --smoke       # every way, on 4 blocks
    python benchmarks/qat.py --model smollm2-135m-fp --shared FOLDER --out OUT --pilot       # rates of ternary
    python benchmarks/qat.py --model smollm2-135m-fp --shared FOLDER --out OUT --seconds 690 --mps
    python benchmarks/qat.py --model smollm2-135m-fp --shared FOLDER --out OUT --seconds 900 --jobs 1 --formats int2-g64
        --ways efficientqat --efficient-samples 4096    # EfficientQAT in full; run it again until its cell is there

Chains of cells (format x way) run side by side, each in a process of its own: blocks and then full training from them;
gptq and rtn; refine; scales, which begin with what blocks left; and EfficientQAT's published recipe. A finished cell
is a JSON file in OUT/cells and is not made again; a second call goes on with the rest. `--seconds` is the whole budget:
ternary is trained until it is nearly over, all else has a fixed number of steps (times --scale). With `--gpus 2`
ternary and binary are trained on the second.
OUT/qat.json, OUT/qat.md and OUT/qat.png hold the table and a plot of whatever cells are there. With `--jobs 1` the log
goes to the terminal.

Measured in bfloat16, dequantized: perplexity on WikiText-2 test (windows of --context) and on wiki_valid, KL
from the unquantized model on both, piqa and arc_easy (the first --items of each), bits per weight of the whole file,
minutes of quantizing and training (beside all other processes), and the most memory that torch held on the device.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

import qat_text
from qat_cells import WAYS, Cell, cell_path, model_path
from qat_measures import load
from qat_smoke import pilot, run_pilot, run_resume, smoke
from qat_table import report

FORMATS = ("int4-g64", "int3-g64", "int2-g64", "int2-g32", "ternary-g64", "binary-g64")
EFFICIENT = ("int2-g64-asym-f16",)
GRACE = 20.0  # seconds after the deadline that a chain may still take


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shared", type=Path, required=True, help="folder of data/, as shared/unpack.py makes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--ways", default=",".join((*WAYS, "efficientqat")))
    parser.add_argument("--efficient-formats", default=",".join(EFFICIENT))
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=690.0)
    parser.add_argument("--leave", type=float, default=60.0, help="of them, to measure and write what the clock ended")
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of everything")
    parser.add_argument("--full-batch", type=int, default=8, help="windows a step of full training")
    parser.add_argument("--full-context", type=int, default=1024)
    parser.add_argument("--full-rate", type=float, default=1.0, help="times the rates of each kind of format")
    parser.add_argument("--full-scale-rate", type=float, default=0.01)
    parser.add_argument("--full-kept-rate", type=float, default=0.0005)
    parser.add_argument("--full-text", type=float, default=0.3, help="weight of the next token, ternary and binary")
    parser.add_argument("--at-once", type=int, default=8, help="windows that run together")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows, of --context tokens")
    parser.add_argument("--efficient-samples", type=int, default=512, help="EfficientQAT's (4096 as published)")
    parser.add_argument("--input-memory", type=float, default=48.0, metavar="GB", help="for the inputs of blocks")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--valid-tokens", type=int, default=131072)
    parser.add_argument("--test-tokens", type=int, default=None)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--prepare", action="store_true", help="only turn the texts into tokens, in OUT/tokens")
    parser.add_argument("--smoke", action="store_true", help="every way on the first blocks of the model, pass or fail")
    parser.add_argument("--pilot", action="store_true", help="choose ternary's rates by short runs: OUT/pilot.json")
    parser.add_argument("--smoke-seconds", type=float, default=90.0)
    parser.add_argument("--report", action="store_true", help="only the table and the plot of the cells in OUT")
    parser.add_argument("--mps", action="store_true", help="run the chains under a CUDA multi-process server")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--chain", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_chain(args: argparse.Namespace) -> int:
    """The cells of one process, in order; how many failed. A failure of one is no reason to leave out the next."""
    baseline = lru_cache(maxsize=1)(lambda: load(args, args.model))
    failed = 0
    for cell in args.chain.split(","):
        format, way = cell.split(":")
        if cell_path(args, format, way).exists():
            continue
        try:
            if format == "pilot":
                run_pilot(args, way)
            elif way == "resume":
                run_resume(args, format)
            else:
                record = Cell(args, format, way, baseline).run()
                kl, perplexity = record["wikitext2"]["kl"], record["wikitext2"]["perplexity"]
                print(f"{cell}: perplexity {perplexity:.3f}, KL {kl:.4f}, {record['minutes']:.2f} min", flush=True)
        except Exception:
            traceback.print_exc()
            failed += 1
    return failed


def chains(args: argparse.Namespace) -> list[str]:
    """What runs in one process each, the longest first."""
    formats, ways = args.formats.split(","), args.ways.split(",")
    order = sorted(formats, key=lambda f: ("ternary" not in f, "binary" not in f, "int2" not in f))
    found = [",".join(f"{f}:{w}" for w in ("blocks", "full") if w in ways) for f in order]
    efficient = [f for f in args.efficient_formats.split(",") if f and "efficientqat" in ways]
    found += [f"{f}:efficientqat" for f in efficient]
    found += [f"{f}:refine" for f in order if "refine" in ways]
    found += [",".join(f"{f}:{w}" for w in ("gptq", "rtn") if w in ways) for f in order]
    found += [f"{f}:scales" for f in order if "scales" in ways]
    found += [f"{f}:gptq,{f}:blocks,{f}:scales" for f in efficient if {"blocks", "scales"} <= set(ways)]
    found += [f"{f}:resume" for f in order[:1] if "resume" in ways]
    return [left for chain in ["bf16:bf16", *found] if (left := unfinished(args, chain))]


def unfinished(args: argparse.Namespace, chain: str) -> str:
    """The cells of a chain that are not there yet."""
    return ",".join(c for c in chain.split(",") if c and not cell_path(args, *c.split(":")).exists())


def is_ready(args: argparse.Namespace, chain: str) -> bool:
    """Whether what a chain begins with is there: scales are trained after blocks."""
    format, way = chain.split(",")[0].split(":")
    return way != "scales" or (model_path(args, format, "blocks") / "whit.json").exists()


class Runner:
    """Chains side by side in processes, until all are done or the time is over. One that fails is run once more."""

    def __init__(self, args: argparse.Namespace, waiting: list[str], environment: dict[str, str]) -> None:
        self.args, self.waiting, self.environment = args, waiting, environment
        self.began = time.time()
        self.deadline = self.began + args.seconds
        self.running: dict[str, tuple[subprocess.Popen[bytes], Any]] = {}
        self.failed: set[str] = set()

    def run(self) -> None:
        try:
            while self.running or (self.waiting and time.time() < self.deadline - 30):
                self._start()
                for chain, (process, log) in list(self.running.items()):
                    if process.poll() is not None:
                        self._ended(chain, process.wait(), log)
                if time.time() > self.deadline + GRACE:
                    break
                time.sleep(0.3)
        finally:
            self._stop()

    def _start(self) -> None:
        ready = [chain for chain in self.waiting if is_ready(self.args, chain)]
        while ready and len(self.running) < self.args.jobs and time.time() < self.deadline - 30:
            chain = ready.pop(0)
            self.waiting.remove(chain)
            name = chain.replace(":", "_").replace(",", "+")
            log = (self.args.out / "logs" / f"{name}.log").open("ab")
            command = [sys.executable, *sys.argv, "--chain", chain, "--deadline", str(self.deadline)]
            to = None if self.args.jobs == 1 else log
            process = subprocess.Popen(command, stdout=to, stderr=subprocess.STDOUT, env=self._beside(chain))
            self.running[chain] = process, log

    def _beside(self, chain: str) -> dict[str, str]:
        """The environment of a chain: with several GPUs, long training has one of its own."""
        if self.args.gpus < 2:
            return self.environment
        long = chain.startswith(("ternary", "binary", "pilot:fast", "pilot:slow")) and ":scales" not in chain
        alone = long and ("full" in chain or "pilot" in chain)
        return {**self.environment, "CUDA_VISIBLE_DEVICES": "1" if alone else "0"}

    def _ended(self, chain: str, status: int, log: Any) -> None:
        log.close()
        del self.running[chain]
        print(f"{time.time() - self.began:5.0f} s {chain}: status {status}", flush=True)
        left = unfinished(self.args, chain)
        if left and chain not in self.failed and time.time() < self.deadline - 60:
            self.failed |= {chain, left}
            self.waiting.append(left)

    def _stop(self) -> None:
        """Interrupt first: a process that is killed beside others of a multi-process server may take them along."""
        for process, _ in self.running.values():
            process.send_signal(signal.SIGINT)
        for chain, (process, log) in self.running.items():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            log.close()
            print(f"{time.time() - self.began:5.0f} s {chain}: not finished", flush=True)


def run_all(args: argparse.Namespace, waiting: list[str]) -> None:
    """Run chains, under a multi-process server where that is asked for."""
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1",
                   "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    server = start_server(environment) if args.mps else False
    try:
        Runner(args, waiting, environment).run()
    finally:
        if server:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=environment, check=False)


def start_server(environment: dict[str, str]) -> bool:
    """Whether a multi-process server with pipes of its own has come up."""
    pipes = tempfile.mkdtemp(prefix="whit-mps-")
    asked = {**environment, "CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=asked, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no multi-process server ({error}); processes take turns", flush=True)
        return False
    environment.update(CUDA_MPS_PIPE_DIRECTORY=pipes, CUDA_MPS_LOG_DIRECTORY=pipes)
    return True


def main() -> int:
    args = arguments()
    args.out = args.out.resolve()
    if args.chain:
        return min(run_chain(args), 1)
    if args.report:
        report(args, FORMATS)
        return 0
    qat_text.prepare(args.model, args.shared, args.out / "tokens")
    if args.smoke:
        return smoke(args)
    if args.pilot:
        pilot(args, lambda waiting: run_all(args, waiting))
    elif not args.prepare:
        run_all(args, chains(args))
        report(args, FORMATS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
