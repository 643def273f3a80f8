"""ggml's types: seconds and error of quantizing one matrix, beside llama.cpp: python benchmarks/ggml_encoders.py

Timed is the public call, `whit.quantize_tensor`. With --types only those are measured; the others stay in the table as
they were, each with the load of the machine at its time.
llama.cpp's own encoder is called where it is installed (`pip install --no-deps xllamacpp`); it runs on one thread.
Errors are squared errors divided by llama.cpp's: of normal weights, and of the same ones where columns have an
importance, each encoder told of it and the squares weighed by it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import whit
from whit.formats import parse_format
from whit.formats.ggml import KINDS
from whit.layouts import GGML
from whit.methods import Clip
from whit.tensor import PackedWeight

import harness

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from llama_cpp import library, quantize_chunk

MATRIX, SMALL = 4096, 512


def ours(weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """The bytes of whit's search."""
    return GGML.pack(Clip().weighted(weight, importance, parse_format(name))).tensors["data"]


def theirs(weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """The bytes of llama.cpp's."""
    kind = KINDS[name]
    return quantize_chunk(weight, kind.number, weight.shape[1] // kind.group_size * kind.bytes_per_group, importance)


def lost(weight: Tensor, data: Tensor, name: str, importance: Tensor | None) -> float:
    """The (weighted) squared error of what the bytes mean."""
    near = GGML.unpack(PackedWeight(GGML.name, parse_format(name), tuple(weight.shape), {"data": data})).dequantize()
    squares = (weight.double() - near).square()
    return float((squares if importance is None else squares * importance).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", default=",".join(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(MATRIX, MATRIX, generator=generator)
    small = 0.02 * torch.randn(SMALL, MATRIX, generator=generator)
    importance = torch.rand(MATRIX, generator=generator).pow(4) * 10 + 0.01
    names, peer = args.types.split(","), library() is not None
    tasks: dict[str, Callable[[], object]] = {}
    for name in names:
        tasks[name] = lambda name=name: whit.quantize_tensor(weight, name)  # type: ignore[misc]
        if peer:
            tasks[f"llama.cpp {name}"] = lambda name=name: theirs(weight, name, None)  # type: ignore[misc]
    load = os.getloadavg()[0]
    seconds = {n: {**harness.spread(v), "load": load} for n, v in harness.interleaved(tasks, args.rounds).items()}
    errors: dict[str, float] = {}
    for name in names if peer else ():
        for kind, given in (("plain", None), ("weighted", importance)):
            mine = lost(small, ours(small, name, given), name, given)
            errors[f"{name} {kind}"] = mine / lost(small, theirs(small, name, given), name, given)
    path = harness.RESULTS / "ggml_encoders.json"
    old = json.loads(path.read_text()) if path.is_file() else {"seconds": {}, "errors": {}}
    for record in old["seconds"].values():
        record.setdefault("load", old.get("load"))
    result = {
        "machine": harness.machine(), "size": MATRIX, "seconds": {**old["seconds"], **seconds},
        "errors": {**old["errors"], **errors},
    }  # fmt: skip
    note = f"\n{MATRIX} x {MATRIX} float32, median of interleaved rounds (min-max), {args.threads} threads."
    harness.save("ggml_encoders", result, table(result["seconds"], result["errors"]) + "\n" + note)


def table(seconds: Mapping[str, Any], errors: Mapping[str, float | None]) -> str:
    """All types that have been measured."""
    rows = []
    for name in (name for name in KINDS if name in seconds):
        cells = [seconds[name], seconds.get(f"llama.cpp {name}")]
        shown = [f"{s['median']:.2f} ({s['min']:.2f}-{s['max']:.2f})" if s else "" for s in cells]
        ratios = [f"{e:.3f}" if (e := errors.get(f"{name} {kind}")) else "" for kind in ("plain", "weighted")]
        rows.append((name, f"{KINDS[name].bits_per_weight:.4g}", *shown, f"{seconds[name]['load']:.1f}", *ratios))
    header = ("type", "bits", "whit, s", "llama.cpp, s (1 thread)", "load", "error / llama.cpp's", "weighted")
    return harness.markdown(header, rows)


if __name__ == "__main__":
    main()
