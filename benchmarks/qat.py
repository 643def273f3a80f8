"""Quantization after training against quantization-aware training: one table for a model, one process for a chain.

    python benchmarks/qat.py --model smollm2-135m-fp --shared FOLDER --out FOLDER [--seconds 420] [--jobs 12] [--mps]

Chains of cells (format x way) run side by side, each in a process of its own: rtn and gptq; refine; blocks and then
scales; full training with distillation; and EfficientQAT's published recipe. A finished cell is a JSON file in
OUT/cells and is not run again. `--seconds` is the whole budget from the start: full training ends when it must leave
time to measure, all else has a fixed number of steps (times --scale). At the end OUT/qat.json, OUT/qat.md and
OUT/qat.png hold the table and a plot of whatever cells are there.

Measured in bfloat16, dequantized: perplexity on WikiText-2 test (windows of --context) and on wiki_valid, KL
from the unquantized model on both, piqa and arc_easy (the first --items of each), bits per weight of the whole file,
minutes of quantizing and training (beside all other processes), and the most memory that torch held on the device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import whit
from whit.calibration import Calibration
from whit.evaluation.listener import Silent
from whit.evaluation.tasks import builtin
from whit.evaluation.text import cut_windows
from whit.evaluation.zeroshot import Scorer, run_task
from whit.finish import peak_memory
from whit.integrations.loading import load_causal_lm, load_tokenizer, maximum_context
from whit.methods import GPTQ, RTN, Blocks, Refine
from whit.modules import remove_packed
from whit.pipeline import run as write
from whit.qat import Course, Setting, Words, prepare_full, prepare_scales, train
from whit.qat.losses import divergence, text_loss
from whit.qat.recipes import efficientqat

from harness import machine

FORMATS = ("int4-g64", "int3-g64", "int2-g64", "int2-g32", "ternary", "binary")
EFFICIENT = ("int2-g64-asym-f16", "int3-g64-asym-f16")
WAYS = ("rtn", "gptq", "refine", "blocks", "scales", "full")
TITLES = {"scales": "blocks + scales", "full": "full, distilled", "efficientqat": "EfficientQAT", "bf16": "bf16"}
# Of the weights in full training, in steps of the format: the wider the steps, the further there is to go.
FULL_RATES = {"int4": 0.004, "int3": 0.006, "int2": 0.01, "ternary": 0.015, "binary": 0.015}
TASKS = ("piqa", "arc_easy")
LEAVE = 75.0  # seconds that full training leaves for writing and measuring


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shared", type=Path, required=True, help="folder of data/, as shared/unpack.py makes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--ways", default=",".join((*WAYS, "efficientqat")))
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of everything")
    parser.add_argument("--full-steps", type=int, default=2000, help="most steps of full training")
    parser.add_argument("--full-batch", type=int, default=30, help="its windows a step")
    parser.add_argument("--full-context", type=int, default=512)
    parser.add_argument("--full-rate", type=float, default=1.0, help="times FULL_RATES")
    parser.add_argument("--full-scale-rate", type=float, default=0.01)
    parser.add_argument("--full-kept-rate", type=float, default=0.0005)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows, of --context tokens")
    parser.add_argument("--efficient-samples", type=int, default=256, help="EfficientQAT's (4096 as published)")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--valid-tokens", type=int, default=131072)
    parser.add_argument("--test-tokens", type=int, default=None)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prepare", action="store_true", help="only turn the texts into tokens, in OUT/tokens")
    parser.add_argument("--mps", action="store_true", help="run the chains under a CUDA multi-process server")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--chain", help=argparse.SUPPRESS)
    return parser.parse_args()


# What is measured


def token_stream(args: argparse.Namespace, name: str, most: int | None = None) -> Tensor:
    """A text as one run of tokens, kept in OUT for all processes."""
    path = args.out / "tokens" / f"{Path(name).stem}.npy"
    import numpy

    if not path.exists():
        tokenizer = load_tokenizer(args.model)
        text = (args.shared / name).read_text(encoding="utf-8")
        pieces = [text[i : i + 200_000] for i in range(0, len(text), 200_000)] if len(text) > 4_000_000 else [text]
        rows = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        whole = numpy.concatenate([numpy.asarray(row, dtype=numpy.int32) for row in rows])
        numpy.save(temporary, whole.astype(numpy.uint16) if whole.max() < 1 << 16 else whole)
        os.replace(temporary, path)
    found = torch.from_numpy(numpy.load(path).astype(numpy.int64))
    return found[:most] if most else found


def measure(args: argparse.Namespace, folder: str, baseline: Any) -> dict[str, Any]:
    """Perplexities, divergences and tasks of a model."""
    device = "cuda" if on_gpu(args) else "cpu"
    model = baseline
    if folder != args.model:
        model = load_causal_lm(folder, device=device, dtype="bfloat16" if on_gpu(args) else "float32")
        remove_packed(model, model.dtype)
    found: dict[str, Any] = {}
    for key, name, most in (
        ("wikitext2", "data/wikitext2/wiki.test.raw", args.test_tokens),
        ("wiki_valid", "data/text/wiki_valid.txt", args.valid_tokens),
    ):
        windows = cut_windows(token_stream(args, name, most), args.context).to(device)
        kl = loss = torch.zeros((), dtype=torch.float64, device=device)
        count = 0
        with torch.inference_mode():
            for batch in torch.split(windows, 2 if on_gpu(args) else 1):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
                loss = loss + text_loss(logits, batch[:, 1:].flatten())
                if model is not baseline:
                    exact = baseline(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
                    kl = kl + divergence(logits, exact)
                count += len(logits)
        found[key] = {"perplexity": math.exp(float(loss) / count), "kl": float(kl) / count, "tokens": count}
    scorer = Scorer(model, load_tokenizer(args.model), maximum_context(model.config))
    tasks = {}
    for name in TASKS if args.items else ():
        task = builtin(name)
        assert task is not None
        result = run_task(task, task.read(args.shared / "data", args.items), scorer, Silent())
        tasks[name] = {"accuracy": result.accuracy, "stderr": result.stderr, "items": result.items}
    found["tasks"] = tasks
    found["average"] = sum(t["accuracy"] for t in tasks.values()) / len(tasks) if tasks else None
    return found


# Cells


def on_gpu(args: argparse.Namespace) -> bool:
    return torch.cuda.is_available() and args.device != "cpu"


def cell_path(args: argparse.Namespace, format: str, way: str) -> Path:
    return args.out / "cells" / f"{format}__{way}.json"


def make(args: argparse.Namespace, format: str, way: str) -> dict[str, Any]:
    """Quantize or train one cell; what it took."""
    out = args.out / "models" / f"{format}__{way}"
    text = args.shared / "data/text/wiki_train.txt"
    options = whit.Options(device="cuda" if on_gpu(args) else "cpu", restart=True)
    calibration = Calibration(text, args.samples, args.context)
    rules = [("*", format)]
    taken: dict[str, Any] = {}

    def seen(what: str, step: int, total: int, loss: float) -> None:
        taken.update(steps=step, loss=loss)
        print(f"{format} {way}: {step}/{total} loss {loss:.4f}", flush=True)

    def steps(count: int) -> int:
        return max(round(count * args.scale), 2)

    if way in ("rtn", "gptq", "refine", "blocks"):
        method = {
            "rtn": RTN(), "gptq": GPTQ(refit=True, sweeps=1), "refine": Refine(steps=steps(200), batch=4),
            "blocks": Blocks(steps=steps(250), batch=4),
        }[way]  # fmt: skip
        used = calibration if method.needs_stats else None
        whit.quantize(args.model, out, whit.Recipe(method, rules), calibration=used, options=options)
    elif way == "scales":
        course = Course(
            steps=steps(100), batch=8, scale_rate=0.01, at_once=max(args.at_once // 2, 1), seed=1
        )  # fmt: skip
        tokens = train_windows(args, course, 1024)
        setting = Setting(options, teacher=args.model)
        start = args.out / "models" / f"{format}__blocks"
        train(prepare_scales(start, out, course, Words(tokens=tokens), setting), seen)
    elif way == "full":
        rate = args.full_rate * FULL_RATES[format.partition("-")[0]]
        course = Course(
            steps=args.full_steps, batch=args.full_batch, rate=rate, scale_rate=args.full_scale_rate,
            kept_rate=args.full_kept_rate, at_once=args.at_once, seed=2,
        )  # fmt: skip
        tokens = train_windows(args, course, args.full_context)
        recipe = whit.Recipe(GPTQ(refit=True, sweeps=1), rules)
        quick = Setting(options, calibration=replace(calibration, samples=max(args.samples // 4, 1)))
        training = prepare_full(args.model, out, recipe, course, Words(tokens=tokens), quick)
        assert training.begin is not None
        write(training.begin)
        left = args.deadline - time.time() - LEAVE
        course = replace(course, seconds=max(left, 1.0)) if args.deadline else course
        begun = replace(quick, start=training.begin.out)
        train(prepare_full(args.model, out, recipe, course, Words(tokens=tokens), begun), seen, save_every=math.inf)
    elif way == "efficientqat":
        phases = efficientqat(whit.parse_format(format), args.efficient_samples)
        first = args.out / "models" / f"{format}__efficientqat-blocks"
        published = replace(calibration, samples=phases.calibration_samples)
        recipe = whit.Recipe(phases.blocks, rules)
        whit.quantize(args.model, first, recipe, calibration=published, options=options)
        tokens = train_windows(args, phases.scales, 2 * args.context)
        train(prepare_scales(first, out, phases.scales, Words(tokens=tokens), Setting(options)), seen)
        taken["samples"] = phases.calibration_samples
    return taken


def train_windows(args: argparse.Namespace, course: Course, context: int) -> Tensor:
    """Windows of the training text, as many as the course takes or there are, in a seeded order."""
    windows = cut_windows(token_stream(args, "data/text/wiki_train.txt"), context)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(course.seed))
    return windows[order[: course.steps * course.batch]]


def run_chain(args: argparse.Namespace) -> None:
    """The cells of one process, in order."""
    if on_gpu(args):
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    baseline = None
    for cell in args.chain.split(","):
        format, way = cell.split(":")
        path = cell_path(args, format, way)
        if path.exists():
            continue
        if on_gpu(args):
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        taken = {} if way == "bf16" else make(args, format, way)
        seconds = time.monotonic() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu(args) else peak_memory()
        if baseline is None:
            dtype = "bfloat16" if on_gpu(args) else "float32"
            baseline = load_causal_lm(args.model, device="cuda" if on_gpu(args) else "cpu", dtype=dtype)
        folder = args.model if way == "bf16" else str(args.out / "models" / f"{format}__{way}")
        record = {"format": format, "way": way, "minutes": seconds / 60, "peak_memory_bytes": peak, **taken}
        if way == "bf16":
            record["bits_per_weight"] = 16.0
        else:
            account = json.loads((Path(folder) / "whit.json").read_text())
            record |= {key: account[key] for key in ("bits_per_weight", "size_bytes", "training")}
            record["recipe"] = account["recipe"]["method"]
        record |= measure(args, folder, baseline)
        record["measuring_seconds"] = time.monotonic() - start - seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, path)
        kl, perplexity = record["wikitext2"]["kl"], record["wikitext2"]["perplexity"]
        print(f"{cell}: perplexity {perplexity:.3f}, KL {kl:.4f}, {seconds / 60:.2f} minutes", flush=True)


# All of them


def chains(args: argparse.Namespace) -> list[str]:
    """What runs in one process each, the longest first."""
    formats, ways = args.formats.split(","), args.ways.split(",")
    order = sorted(formats, key=lambda f: ("ternary" not in f, "binary" not in f, "int2" not in f))
    found = [f"{f}:full" for f in order if "full" in ways]
    found += [f"{f}:efficientqat" for f in EFFICIENT if "efficientqat" in ways]
    found += [",".join(f"{f}:{w}" for w in ("blocks", "scales") if w in ways) for f in order]
    found += [f"{f}:refine" for f in order if "refine" in ways]
    found += [",".join(f"{f}:{w}" for w in ("rtn", "gptq") if w in ways) for f in order]
    waiting = [",".join(c for c in chain.split(",") if c and not cell_path(args, *c.split(":")).exists()) for chain in
               ["bf16:bf16", *found]]  # fmt: skip
    return [chain for chain in waiting if chain]


def run_all(args: argparse.Namespace) -> None:
    began = time.time()
    deadline = began + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("data/text/wiki_train.txt", "data/text/wiki_valid.txt", "data/wikitext2/wiki.test.raw"):
        token_stream(args, name)
    if args.prepare:
        return
    print(f"texts are tokens after {time.time() - began:.0f} s", flush=True)
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1",
                   "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    server = start_server(environment) if args.mps else None
    waiting, running = chains(args), dict[str, tuple[subprocess.Popen[bytes], Any]]()
    logs = args.out / "logs"
    logs.mkdir(exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs and time.time() < deadline - 30:
                chain = waiting.pop(0)
                log = (logs / f"{chain.replace(':', '_').replace(',', '+')}.log").open("wb")
                command = [sys.executable, *sys.argv, "--chain", chain, "--deadline", str(deadline)]
                running[chain] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), log
            for chain, (process, log) in list(running.items()):
                if process.poll() is not None or time.time() > deadline + 30:
                    if process.poll() is None:
                        process.kill()
                    log.close()
                    print(f"{time.time() - began:5.0f} s {chain}: status {process.wait()}", flush=True)
                    del running[chain]
            if time.time() > deadline - 30:
                waiting.clear()
            time.sleep(0.5)
    finally:
        for process, _ in running.values():
            process.kill()
        if server is not None:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=environment, check=False)
    report(args)


def start_server(environment: dict[str, str]) -> bool | None:
    """A multi-process server with pipes of its own; None where there is none."""
    pipes = tempfile.mkdtemp(prefix="whit-mps-")
    asked = {**environment, "CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=asked, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no multi-process server ({error}); processes take turns", flush=True)
        return None
    environment.update(CUDA_MPS_PIPE_DIRECTORY=pipes, CUDA_MPS_LOG_DIRECTORY=pipes)
    return True


def report(args: argparse.Namespace) -> None:
    """The table, as JSON and Markdown, and the plot."""
    cells = [json.loads(path.read_text()) for path in sorted((args.out / "cells").glob("*.json"))]
    (args.out / "qat.json").write_text(json.dumps({"machine": machine(), "cells": cells}, indent=1))
    found = {(cell["format"], cell["way"]): cell for cell in cells}
    lines = [
        "| format | way | bits | WikiText-2 | KL | gap closed | wiki_valid | KL | zero-shot | minutes | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = [("bf16", "bf16")] + [(f, w) for f in (*FORMATS, *EFFICIENT) for w in (*WAYS, "efficientqat")]
    for format, way in keys:
        if cell := found.get((format, way)):
            lines.append(row(cell, found.get((format, "gptq"))))
    (args.out / "qat.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    try:
        plot(args.out / "qat.png", found)
    except ImportError as error:
        print(f"no plot: {error}", flush=True)


def row(cell: Mapping[str, Any], gptq: Mapping[str, Any] | None) -> str:
    test, valid = cell["wikitext2"], cell["wiki_valid"]
    closed = "" if gptq is None or cell["way"] in ("rtn", "gptq") else f"{1 - test['kl'] / gptq['wikitext2']['kl']:.0%}"
    average = "" if cell["average"] is None else f"{100 * cell['average']:.1f}"
    return (
        f"| {cell['format']} | {TITLES.get(cell['way'], cell['way'])} | {cell['bits_per_weight']:.2f} | "
        f"{test['perplexity']:.2f} | {test['kl']:.4f} | {closed} | {valid['perplexity']:.2f} | {valid['kl']:.4f} | "
        f"{average} | {cell['minutes']:.1f} | {cell['peak_memory_bytes'] / 1e9:.1f} GB |"
    )


def plot(path: Path, found: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """KL on WikiText-2 of every way, by format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for way in WAYS:
        points = [(i, found[f, way]["wikitext2"]["kl"]) for i, f in enumerate(FORMATS) if (f, way) in found]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=TITLES.get(way, way))
    axes.set_xticks(range(len(FORMATS)), FORMATS)
    axes.set_yscale("log")
    axes.set_ylabel("KL from bf16 on WikiText-2, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    asked = arguments()
    asked.out = asked.out.resolve()
    run_chain(asked) if asked.chain else run_all(asked)
