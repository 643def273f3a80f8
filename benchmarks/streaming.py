"""Peak memory and time of quantizing a 3-billion-parameter checkpoint, beside their floor.

    python benchmarks/streaming.py [--folder DIR] [--layers 30] [--format int4-g128] [--threads 2]

Makes a random bfloat16 Llama of 3.2 B parameters (6.4 GB, sharded) in DIR, measures, writes results/streaming.json
and .md, and deletes DIR's content. The floor is measured in the same run, on the same files: reading every byte, the
method's own arithmetic (quantize, pack, relative error) on matrices of the same shapes, writing the result's bytes
with fsync. Seconds are wall time, which other work on the machine stretches, and, more robust, processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers as hf

from random_model import write_random
from whit import Recipe
from whit.checkpoint.reader import Checkpoint
from whit.layouts import BITS
from whit.pipeline.job import Options, prepare
from whit.pipeline.parameter import relative_error

RESULTS = Path(__file__).parent / "results"
SHAPE = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}


def make_checkpoint(folder: Path, layers: int) -> None:
    """A random Llama with untied head, shards of 1 GB, one tensor in memory at a time."""
    config = hf.LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=32_000, max_position_embeddings=4096)
    write_random(folder, config, 1_000_000_000)


def drop_caches(folder: Path) -> None:
    """Make the next reads come from the disk."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_floor(folder: Path, spec: str) -> dict[str, float]:
    """Seconds of reading, arithmetic and writing, each alone."""
    job = prepare(folder, folder.parent / "floor", Recipe(rules=[("*", spec)]), Options())
    drop_caches(folder)
    start = time.perf_counter()
    with Checkpoint(folder) as checkpoint:
        for name in checkpoint:
            checkpoint[name]
    reading = time.perf_counter() - start
    seconds: dict[tuple[int, ...], tuple[float, float]] = {}
    arithmetic = busy = 0.0
    for item in job.plan.items:
        if item.format is not None:
            if item.spec.shape not in seconds:
                seconds[item.spec.shape] = time_arithmetic(job.recipe.method, item.format, item.spec.shape)
            wall, processor = seconds[item.spec.shape]
            arithmetic += wall
            busy += processor
    writing = time_writing(folder.parent, job.plan.size_bytes)
    return {"reading": reading, "arithmetic": arithmetic, "writing": writing, "arithmetic_processor": busy}


def time_arithmetic(method, format, shape: tuple[int, ...], repeats: int = 3) -> tuple[float, float]:
    """Mean wall and processor seconds of quantizing, packing and measuring one matrix."""
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    total = busy = 0.0
    with torch.no_grad():
        for repeat in range(repeats + 1):
            start, processor = time.perf_counter(), time.process_time()
            quantized = method(weight, None, format)
            BITS.pack(quantized)
            relative_error(weight, quantized.dequantize())
            total += (time.perf_counter() - start) * (repeat > 0)
            busy += (time.process_time() - processor) * (repeat > 0)
    return total / repeats, busy / repeats


def time_writing(folder: Path, size: int) -> float:
    """Seconds of writing and syncing `size` bytes."""
    path, chunk = folder / "floor.bin", os.urandom(1 << 24)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(0, size, len(chunk)):
            file.write(chunk)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def measure_run(folder: Path, spec: str, threads: int) -> dict[str, float]:
    """Wall seconds, the account's seconds and VmHWM of `whit quantize` in a process of its own."""
    out = folder.parent / "out"
    code = (
        "import sys; from whit.cli import main\n"
        "try: main()\n"
        "finally: print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0], file=sys.stderr)"
    )
    drop_caches(folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, "quantize", str(folder), str(out), "--format", spec, "--json"]
    start = time.perf_counter()
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = next(int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("VmHWM"))
    account = json.loads(done.stdout)
    return {
        "wall": wall, "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_memory_bytes": 1024 * peak, "size_bytes": account["size_bytes"],
        "bits_per_weight": account["bits_per_weight"],
    }  # fmt: skip


def time_start() -> float:
    """Seconds until python has imported whit."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import whit.cli"], check=True)
    return time.perf_counter() - start


def table(result: dict) -> str:
    """The result as Markdown."""
    floor, run = result["floor_seconds"], result["run"]
    total = floor["reading"] + floor["arithmetic"] + floor["writing"]
    rows = [
        ("reading the source", f"{floor['reading']:.1f} s"),
        ("arithmetic: quantize, pack, measure the error", f"{floor['arithmetic']:.1f} s"),
        ("writing and syncing the result", f"{floor['writing']:.1f} s"),
        ("**sum**", f"**{total:.1f} s**"),
        ("python and imports", f"{result['start_seconds']:.1f} s"),
        ("**`whit quantize`, imports included**", f"**{run['wall']:.1f} s**"),
        ("ratio to the sum", f"{run['wall'] / total:.2f}"),
        ("processor time of the arithmetic alone", f"{floor['arithmetic_processor']:.1f} s"),
        ("processor time of all of `whit quantize`", f"{run['processor']:.1f} s"),
        ("peak resident memory", f"{run['peak_memory_bytes'] / 1e9:.2f} GB"),
        ("bits per weight", f"{run['bits_per_weight']:.3f}"),
    ]
    head = f"`whit quantize --format {result['format']}` of a random Llama with {result['parameters']:,} parameters"
    lines = [f"# {head}", "", result["machine"], "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where 9 GB are free (a temporary folder by default)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = Path(tempfile.mkdtemp(prefix="whit-streaming-", dir=arguments.folder))
    try:
        folder = work / "model"
        folder.mkdir()
        make_checkpoint(folder, arguments.layers)
        with Checkpoint(folder) as checkpoint:
            parameters = sum(e.spec.nbytes // 2 for e in checkpoint.entries.values())
        run = measure_run(folder, arguments.format, arguments.threads)
        floor = measure_floor(folder, arguments.format)
        load = os.getloadavg()[1]
        machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {arguments.threads} threads, "
        machine += f"load {load:.1f}, torch {torch.__version__}"
        result = {
            "machine": machine, "format": arguments.format, "parameters": parameters, "run": run,
            "floor_seconds": floor, "start_seconds": time_start(),
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "streaming.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "streaming.md").write_text(table(result))
        print(table(result))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
