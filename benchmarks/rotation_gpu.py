"""What rotating the inputs costs on a Hopper GPU: python benchmarks/rotation_gpu.py [--seconds 30] [--device cuda]

First checks: W8A8 and LLM.int8() of rotated weights against the torch functions that define correct, and from a CUDA
graph. Then medians of `whit::packed_linear`'s kernels in CUDA graphs over cold weights (400 MB of distinct ones): int8
with and without the rotation beside torch's bf16 product. `--device cpu` runs the checks alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from whit.activations import parse_activations
from whit.formats import parse_format
from whit.kernels import select
from whit.kernels.activated import Activation8
from whit.kernels.rotated import Rotation
from whit.layouts import BITS
from whit.tensor import PackedWeight

import harness
from gpu_harness import Budget, copies, seconds_cold

SHAPES = ((4096, 4096), (4096, 14336))
ROWS = (1, 16, 256, 4096)


def weight(spec: str, how: str, shape: tuple[int, int], generator: torch.Generator, device: str) -> PackedWeight:
    """Random codes."""
    format, tensors = parse_format(spec), {}
    for name, want in BITS.specs(format, shape).items():
        if want.dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, want.shape, dtype=torch.uint8, generator=generator).to(device)
        else:
            tensors[name] = (torch.rand(want.shape, generator=generator) * 0.01 + 0.001).to(device)
    return PackedWeight(BITS.name, format, shape, tensors, activations=parse_activations(how))


def checked(device: str) -> dict[str, float]:
    """The largest difference from the reference, as a share of the largest output."""
    found, generator = {}, torch.Generator().manual_seed(0)
    for how in ("int8", "int8-outliers"):
        for rows in (1, 5, 300):
            stored = weight("int8+h64", how, (512, 1536), generator, device)
            x = torch.randn(rows, 1536, generator=generator).to(device, torch.bfloat16)
            x[:, 7] *= 40
            kernel = select(stored, x)
            prepared = kernel.prepare(stored)
            expected = Rotation(Activation8()).linear(x, stored, None).float()
            near = kernel.linear(x, prepared, None)
            found[f"{kernel.name} {how} {rows} rows"] = float((near - expected).abs().max() / expected.abs().max())
            if device != "cpu":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    again = kernel.linear(x, prepared, None)
                graph.replay()
                assert torch.equal(again, near), (how, rows)
    assert max(found.values()) < 0.02, found
    return found


def timed(budget: Budget) -> list[dict[str, object]]:
    """Seconds of each product, in bf16."""
    generator, found = torch.Generator().manual_seed(1), []
    for shape in SHAPES:
        first = weight("int8", "int8", shape, generator, "cuda")
        plain = [first, *(copied(first) for _ in range(copies(first.nbytes) - 1))]
        turned = [replace(w, format=parse_format("int8+h64")) for w in plain]
        dense = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * first.nbytes))]
        for rows in ROWS:
            if budget.left < 3:
                return found
            x = torch.randn(rows, shape[1], generator=generator).to("cuda", torch.bfloat16)
            calls: dict[str, list[Callable[[], Tensor]]] = {
                "bf16": [partial(torch.nn.functional.linear, x, w) for w in dense],
                "int8": [product(x, w) for w in plain],
                "int8+h64": [product(x, w) for w in turned],
            }
            row = {"shape": shape, "rows": rows, **{name: seconds_cold(each) for name, each in calls.items()}}
            found.append(row)
            print(row, flush=True)
    return found


def copied(stored: PackedWeight) -> PackedWeight:
    return replace(stored, tensors={key: tensor.clone() for key, tensor in stored.tensors.items()})


def product(x: Tensor, stored: PackedWeight) -> Callable[[], Tensor]:
    kernel = select(stored, x)
    return partial(kernel.linear, x, kernel.prepare(stored), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also here, as JSON and a table")
    args = parser.parse_args()
    budget = Budget(args.seconds)
    checks = checked(args.device)
    print(checks, flush=True)
    rows = timed(budget) if args.device != "cpu" else []
    table = [
        (
            "x".join(map(str, row["shape"])),
            str(row["rows"]),
            *(f"{1e6 * row[name]:.1f}" for name in ("bf16", "int8", "int8+h64")),
            f"{row['bf16'] / row['int8+h64']:.2f}",
        )
        for row in rows
    ]
    header = ("out x in", "rows", "bf16 µs", "int8 µs", "int8+h64 µs", "int8+h64 to bf16")
    if args.out is not None:
        harness.RESULTS = args.out.parent
    result = {"machine": harness.machine(), "checks": checks, "rows": rows}
    harness.save("rotation_gpu", result, harness.markdown(header, table))


if __name__ == "__main__":
    main()
