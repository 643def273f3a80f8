"""Batch-1 decoding of a small Llama on the processor: whit beside llama.cpp and transformers, each in its own process.

    PYTHONPATH=src python benchmarks/decode.py MODEL [--threads 2] [--rounds 5] [--peers DIR] [--work DIR]

MODEL is a bfloat16 checkpoint (smollm2-135m-fp). The candidates are made once, in --work: whit's int4-g32 with an int8
embedding, the same with inputs in int8 (fast), llama.cpp's Q4_0 and Q4_K_M. PyPI's `xllamacpp` carries llama.cpp;
--peers is where `pip install --no-deps --target DIR xllamacpp` put it. All take turns, in processes that stay. Peak
memory is told with and without the libraries that a process had loaded before the model. --large measures a random
Llama of 3 B parameters at int4-g128 instead (`decode_large.py`; MODEL is not read then).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import decode_large

from harness import machine, markdown, resident, save, wait_as_usual

NOTE = """
Peaks: what a process held at the most until a prompt of 32 tokens and 128 new ones were through, less what the imported
libraries (Python, torch, transformers, whit) held before the model; then after prompts of 512 tokens too; and, with the
libraries, all of the process in the first case. Pages of mapped files count."""
CANDIDATES = ("bf16", "whit exact", "whit fast", "llama.cpp Q4_0", "llama.cpp Q4_K_M")
WHIT = ("--format", "int4-g32", "--rule", "model.embed_tokens=int8-g32")


def make(name: str, model: str, work: Path) -> Path:
    """The candidate's weights, made by `whit quantize` where they are not there yet."""
    if name == "bf16":
        return Path(model)
    exact, short = name.startswith("whit"), name.rpartition(" ")[2].lower()
    out = work / (f"whit-{short}" if exact else f"{short}.gguf")
    if not out.exists():
        options = WHIT if exact else ("--export", "gguf", "--format", short)
        options += ("--activations", "int8-g32") if short == "fast" else ()
        subprocess.run(
            [sys.executable, "-m", "whit", "quantize", model, str(out), "--method", "rtn", *options], check=True
        )
    return out


def size(path: Path) -> int:
    """Bytes of the weight files."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def child(name: str, path: str, threads: int) -> None:
    """Serve one candidate: a line of JSON in, a line of JSON out."""
    torch.set_num_threads(threads)
    from transformers import LlamaForCausalLM  # noqa: F401  (libraries are not the model's memory)

    bare = resident("VmRSS")
    from whit.cli.quiet import quiet_transformers
    from whit.evaluation.model_speed import LlamaCpp, Transformers
    from whit.integrations.loading import load_causal_lm

    quiet_transformers()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name.startswith("llama.cpp"):
        import xllamacpp  # noqa: F401

        before = resident("VmRSS")
        one: Any = LlamaCpp(Path(path), threads)
    else:
        torch.nn.functional.linear(torch.ones(512, 64).bfloat16(), torch.ones(64, 64).bfloat16())
        before = resident("VmRSS")
        one = Transformers(load_causal_lm(path, device="cpu"), compiled=name != "bf16")
    for line in sys.stdin:
        asked = json.loads(line)
        took = one.prefill(asked["prompt"]) if not asked["new"] else one.decode(asked["prompt"], asked["new"])
        peak = resident("VmHWM")
        said = {"seconds": took, "cpu": time.process_time(), "peak": peak, "libraries": before, "bare": bare}
        print(json.dumps(said), file=answers, flush=True)
    os._exit(0)  # llama.cpp's server has threads of its own


class Process:
    """A candidate in a process of its own."""

    def __init__(self, name: str, path: Path, threads: int, peers: str) -> None:
        search = os.pathsep.join([*filter(None, (os.environ.get("PYTHONPATH"),)), str(Path(__file__).parent)])
        search += os.pathsep + peers if peers else ""
        self.pipe = subprocess.Popen(
            [sys.executable, __file__, "--child", name, str(path), "--threads", str(threads)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": search},
        )  # fmt: skip

    def ask(self, prompt: int, new: int) -> dict[str, Any]:
        assert self.pipe.stdin is not None
        assert self.pipe.stdout is not None
        self.pipe.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        self.pipe.stdin.flush()
        answer: dict[str, Any] = json.loads(self.pipe.stdout.readline())
        return answer


def compare(args: argparse.Namespace) -> None:
    from whit.evaluation.kernel_speed import measure_limits

    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    names = [name for name in CANDIDATES if args.peers or not name.startswith("llama.cpp")]
    paths = {name: make(name, args.model, args.work) for name in names}
    limits = measure_limits()
    processes = {name: Process(name, path, args.threads, args.peers) for name, path in paths.items()}
    cases = {"decode 128": (32, 128), "prefill 512": (512, 0)}  # in this order: peaks are a process's, and stay
    seconds: dict[str, dict[str, list[float]]] = {name: {case: [] for case in cases} for name in names}
    memory: dict[str, dict[str, int]] = {name: {} for name in names}
    for turn in range(args.rounds + 1):
        for name, process in processes.items():
            for case, lengths in cases.items():
                said = process.ask(*lengths)
                memory[name] |= {"libraries": said["libraries"], "bare": said["bare"]}
                memory[name].setdefault(case, said["peak"])
                if turn:  # the first one warms up
                    seconds[name][case].append(said["seconds"])
    for process in processes.values():
        process.pipe.kill()
    rows, found = [], {}
    for name in names:
        decode, prefill = (statistics.median(seconds[name][case]) for case in cases)
        plain = statistics.median(seconds["bf16"]["decode 128"])
        nbytes = size(paths[name])
        share = 128 * nbytes / limits.read_bytes_per_second / decode
        found[name] = {
            "bytes": nbytes, "peak_bytes": memory[name], "prefill_seconds": seconds[name]["prefill 512"],
            "decode_seconds": seconds[name]["decode 128"], "share_of_limit": share,
        }  # fmt: skip
        held = memory[name]
        beyond = [(held[case] - held["libraries"]) / nbytes for case in cases]
        rows.append(
            (name, f"{nbytes / 1e6:.1f}", f"{512 / prefill:.0f}", f"{128 / decode:.1f}", f"{plain / decode:.2f}",
             f"{100 * share:.0f} %", f"{beyond[0]:.2f}", f"{beyond[1]:.2f}", f"{held['decode 128'] / 1e6:.0f}")
        )  # fmt: skip
    header = (
        "candidate", "MB", "prefill 512, tokens/s", "decode, tokens/s", "x bf16", "of the limit", "peak / file",
        "after 512", "all of it, MB",
    )  # fmt: skip
    about = {**machine(), "read_bytes_per_second": limits.read_bytes_per_second, "matmul_flops": limits.matmul_flops}
    save("decode", {"machine": about, "candidates": found}, markdown(header, rows) + "\n" + NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="")
    parser.add_argument("--work", type=Path, default=Path("/tmp/whit-decode"))
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--layers", type=int, default=decode_large.LAYERS, help="of the large one")
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.threads)
    elif args.large:
        decode_large.large(args)
    else:
        compare(args)


if __name__ == "__main__":
    wait_as_usual()
    main()
