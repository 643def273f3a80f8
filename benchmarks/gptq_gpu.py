"""GPTQ of a Llama-3-8B-shaped model on a GPU: seconds per block, memory, and where the time goes.

    python benchmarks/gptq_gpu.py [--blocks 8] [--folder DIR] [--samples 128] [--format int4-g128]

Makes a random bfloat16 Llama-3-8B of the first `--blocks` of its 32 blocks in DIR, quantizes it with GPTQ on
samples x 2048 tokens from disk to disk, and writes results/gptq_gpu.json and .md. The whole model is what lies outside
the blocks plus 32 times the median block. The profile is that of one block, by kind of kernel; operations are counted
by hand and set against the matrix product that is measured in the same run. So is memory: for each unit the most that
torch held, what it still held and had reserved in the end, and of what larger tensors that was.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile

from random_model import write_random
from whit import GPTQ, Calibration, Options, Recipe
from whit.pipeline import quantize

from harness import machine

RESULTS = Path(__file__).parent / "results"
HIDDEN, INNER, KEYS, CONTEXT, BLOCKS = 4096, 14336, 1024, 2048, 32
KINDS = (
    ("sums of x^T x and the model's products", ("bf16", "nvjet", "s16816", "xmma", "sm90_xmma_gemm_bf")),
    ("attention", ("flash", "fmha", "attention")),
    ("float64 products and factors", ("dgemm", "f64", "potrf", "trsm", "cholesky")),
    ("copies", ("memcpy", "memset")),
)


def make_checkpoint(folder: Path, blocks: int) -> None:
    """A random model with a tokenizer of a thousand words."""
    config = hf.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=8192,
    )  # fmt: skip
    write_random(folder, config, device="cuda")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def ceiling(dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of a square product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float32).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * size**3 / statistics.median(times[1:]) / 1e12


LARGE = 200_000_000  # bytes of a tensor that is named


def large_tensors() -> list[str]:
    """What lies on the device in large pieces, cycles that wait for Python's collector included: dtype, shape, GB."""
    found: dict[int, str] = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and value.device.type == "cuda":
            storage = value.untyped_storage()
            if storage.nbytes() > LARGE:
                what = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}: {storage.nbytes() / 1e9:.2f} GB"
                found[storage.data_ptr()] = what
    return sorted(found.values())


def counted_bytes() -> dict[str, int]:
    """Bytes that are alive at a block's peak, while GPTQ walks over down_proj; see methods/gptq."""
    down = HIDDEN * INNER
    return {
        "the block, bfloat16": 2 * (HIDDEN * (2 * HIDDEN + 2 * KEYS) + 3 * down),
        "x^T x of its four inputs, float32": 4 * (3 * HIDDEN**2 + INNER**2),
        "the factor of down_proj's, float64": 8 * INNER**2,
        "while it is made: half of it again": 4 * INNER**2,
        "or targets and changes of the walk, float64": 16 * down,
        "codes and what the writer holds of up_proj": down + 4 * down + down // 2,
    }


class Clock:
    """When each unit was done and what it held; profiles the block after the second."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.kernels: dict[str, float] = {}
        self.peaks: dict[str, int] = {}  # bytes that torch held at most in a unit
        self.ends: dict[str, dict[str, Any]] = {}  # bytes, and the large tensors, when a unit was done
        self._last = time.perf_counter()
        self._profile: profile | None = None

    def __call__(self, unit: str, done: int, total: int) -> None:
        torch.cuda.synchronize()
        self.times[unit] = time.perf_counter() - self._last
        self.peaks[unit] = torch.cuda.max_memory_allocated()
        self.ends[unit] = {
            "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
            "most_reserved": torch.cuda.max_memory_reserved(), "large": large_tensors(),
        }  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        if unit.endswith("layers.1"):
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
        elif self._profile is not None:
            self._profile.stop()
            self.kernels = {e.key: e.self_device_time_total / 1e6 for e in self._profile.key_averages()}
            self._profile = None
        self._last = time.perf_counter()


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """Seconds on the device by kind of kernel."""
    found: dict[str, float] = defaultdict(float)
    for name, seconds in kernels.items():
        low = name.lower()
        kind = next((kind for kind, marks in KINDS if any(mark in low for mark in marks)), "other small kernels")
        found[kind] += seconds
    return dict(found)


def operations(tokens: int) -> dict[str, float]:
    """Floating-point operations of one block: of the model (it runs twice), of x^T x, in float64."""
    weights = HIDDEN * (2 * HIDDEN + 2 * KEYS) + 3 * HIDDEN * INNER
    attention = 4 * CONTEXT * HIDDEN  # of a token, scores and values, the causal half of them
    columns = {HIDDEN: 2 * HIDDEN + 2 * KEYS + 2 * INNER, INNER: HIDDEN}  # width: rows of the matrices of that width
    return {
        "model": 2 * tokens * (2 * weights + attention),
        "x^T x": 2.0 * tokens * (3 * HIDDEN**2 + INNER**2),
        "float64": sum(rows * n**2 for n, rows in columns.items()) + 6 * HIDDEN**3 + INNER**3,
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make, quantize, measure."""
    make_checkpoint(folder / "model", arguments.blocks)
    words = torch.randint(0, 1000, (arguments.samples * CONTEXT + CONTEXT,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in words.tolist()))
    bf16, float64 = ceiling(torch.bfloat16, 8192), ceiling(torch.float64, 4096)
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    start = time.perf_counter()
    account = quantize(
        folder / "model", folder / "out", Recipe(GPTQ(), [("*", arguments.format)]),
        calibration=Calibration(folder / "text.txt", samples=arguments.samples, context=CONTEXT),
        options=Options(device="cuda", progress=clock),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    blocks = [value for name, value in clock.times.items() if ".layers." in name]
    block = statistics.median(blocks[3:] or blocks)
    count = operations(arguments.samples * CONTEXT)
    least = (count["model"] + count["x^T x"]) / bf16 / 1e12 + count["float64"] / float64 / 1e12
    return {
        "machine": machine(), "format": arguments.format, "samples": arguments.samples, "context": CONTEXT,
        "blocks": arguments.blocks, "seconds": seconds,
        "other_units": {k: v for k, v in clock.times.items() if ".layers." not in k},
        "block_seconds": blocks, "block_median": block,
        "whole_model_seconds": seconds - sum(blocks) + blocks[0] + (BLOCKS - 1) * block,
        "gpu_memory_bytes": max(clock.peaks.values()), "unit_memory_bytes": clock.peaks,
        "reserved_bytes": max(end["most_reserved"] for end in clock.ends.values()),
        "unit_ends": clock.ends, "counted_bytes": counted_bytes(),
        "peak_memory_bytes": account.peak_memory_bytes,
        "tflops": {"bf16": bf16, "float64": float64}, "operations": count, "floor_seconds": least,
        "share_of_matrix_throughput": least / block,
        "profile": by_kind(clock.kernels),
        "kernels": dict(sorted(clock.kernels.items(), key=lambda kv: -kv[1])[:25]),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# GPTQ of a Llama-3-8B-shaped model on a GPU", "",
        f"{found['machine'].get('gpu')}; {found['samples']} x {found['context']} tokens, {found['format']}, "
        f"{found['blocks']} of {BLOCKS} blocks run, random weights. `python benchmarks/gptq_gpu.py`", "",
        "| | |", "|---|---|",
        f"| a block, median | {found['block_median']:.2f} s |",
        f"| {BLOCKS} blocks and the rest, from that | {found['whole_model_seconds']:.0f} s |",
        f"| GPU memory, allocated / reserved | {found['gpu_memory_bytes'] / 1e9:.1f} / "
        f"{found['reserved_bytes'] / 1e9:.1f} GB |",
        f"| bf16 / float64 products here | {found['tflops']['bf16']:.0f} / {found['tflops']['float64']:.0f} TFLOP/s |",
        f"| a block's operations at those rates | {found['floor_seconds']:.2f} s, "
        f"{found['share_of_matrix_throughput']:.0%} of the time |", "",
        "| one block, on the device | seconds |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| {kind} | {value:.2f} |" for kind, value in found["profile"].items()]
    lines += ["", "| GB of GPU memory | at most | in the end | reserved | tensors over 0.2 GB in the end |"]
    lines += ["|---|---|---|---|---|"]
    for unit, end in found["unit_ends"].items():
        sizes = (found["unit_memory_bytes"][unit], end["allocated"], end["reserved"])
        cells = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
        lines.append(f"| {unit} | {cells} | {'; '.join(end['large']) or 'none'} |")
    lines += ["", "| a block's peak, counted | GB |", "|---|---|"]
    lines += [f"| {what} | {size / 1e9:.2f} |" for what, size in found["counted_bytes"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        found = run(arguments, folder)
    finally:
        shutil.rmtree(folder)
    (arguments.results / "gptq_gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.results / "gptq_gpu.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
