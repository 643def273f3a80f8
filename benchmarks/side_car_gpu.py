"""Products with side-cars, every tensor in guarded memory: python benchmarks/side_car_gpu.py [--seconds 60]

Weights, activations and whatever a kernel asks torch for (results, scratch) lie between bytes of 0xFF, which are NaNs
to who reads them and must still be there when the product is done. Results are held against float64 of the same codes
and factors: the shapes of a small real model and ragged ones, few rows and many, activations that lie in one piece, in
pieces, and off sixteen bytes. CUDA_LAUNCH_BLOCKING=1 names a launch that faults; where compute-sanitizer is there,

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/side_car_gpu.py --quick

sees each access.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import whit
from whit.kernels import select
from whit.layouts import BITS
from whit.tensor import PackedWeight

from harness import RESULTS, machine

SPECS = ("int2-g32", "int3-g64", "int4-g64", "nf4-dq", "q4_k", "int2-g64-asym", "int4-channel")
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (1000, 1152), (49, 1536))
QUICK = ((192, 576), (49, 1536))
ROWS = (1, 5, 16, 40, 130, 520)
RANK = 16
GUARD = 4096  # bytes on either side
LIMIT = 5e-3


class Guarded(TorchFunctionMode):
    """Inside, `torch.empty` and `torch.zeros` give tensors between guards; `broken` counts what was written into."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.zeros) or not found.numel():
            return found
        return self.place(found)

    def place(self, tensor: Tensor, skip: int = 0) -> Tensor:
        """Its values between guards, `skip` bytes behind a place of 4,096."""
        size = tensor.nbytes
        buffer = torch.full((size + 2 * GUARD + skip,), 0xFF, dtype=torch.uint8, device=tensor.device)
        self.buffers.append((buffer, size + skip))
        inside = buffer[GUARD + skip : GUARD + skip + size].view(tensor.dtype).view(tensor.shape)
        return inside.copy_(tensor)

    def broken(self, keep: int) -> int:
        """How many tensors have a guard that is not what it was; all but the first `keep` are let go."""
        ends = [(buffer[:GUARD] != 255).any() | (buffer[GUARD + size :] != 255).any() for buffer, size in self.buffers]
        del self.buffers[keep:]
        return sum(bool(end) for end in ends)


def weight(spec: str, shape: tuple[int, int], guarded: Guarded, device: str) -> tuple[PackedWeight, Tensor]:
    """A packed weight with a side-car between guards, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    quantized = whit.quantize_tensor(torch.randn(shape, generator=generator), f"{spec}+r{RANK}")
    packed = BITS.pack(quantized)
    tensors = {name: guarded.place(tensor.to(device)) for name, tensor in packed.tensors.items()}
    return PackedWeight(packed.layout, packed.format, packed.shape, tensors), quantized.dequantize(torch.float64)


def placements(x: Tensor, guarded: Guarded) -> Iterator[tuple[str, Tensor]]:
    """x (rows, columns) in the ways that it may lie in memory."""
    yield "whole", guarded.place(x)
    yield "off sixteen bytes", guarded.place(x, x.element_size())
    wide = guarded.place(torch.cat([x, torch.full_like(x[:, :8], float("nan"))], dim=1))
    yield "rows apart", wide[:, : x.shape[1]]
    yield "columns apart", guarded.place(x.t().contiguous()).t()


def products(
    spec: str, shape: tuple[int, int], device: str, rows_tried: tuple[int, ...]
) -> Iterator[tuple[str, float, int]]:
    """What was tried, its relative error and the guards that it wrote into."""
    guarded = Guarded()
    packed, wanted_weight = weight(spec, shape, guarded, device)
    wanted_weight = wanted_weight.to(device)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    for rows in rows_tried:
        fresh = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(device, torch.bfloat16)
        wanted = fresh.double() @ wanted_weight.T + bias.double()
        kernel = select(packed, fresh)
        with guarded:
            prepared = kernel.prepare(packed)
        held = len(guarded.buffers)
        for way, x in placements(fresh, guarded):
            placed_bias = guarded.place(bias)
            for name, each in (("stored", packed), ("prepared", prepared)):
                with guarded:
                    y = kernel.linear(x, each, placed_bias)
                error = ((y.double() - wanted).norm() / wanted.norm()).item()
                yield f"{spec} {shape} {kernel.name}, {rows} rows, x {way}, {name}", error, guarded.broken(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="no weight is begun after these")
    parser.add_argument("--quick", action="store_true", help="two shapes and two numbers of rows")
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--out", type=Path, default=RESULTS / "side_car_gpu.json")
    args = parser.parse_args()
    end, checks, failures, left = time.monotonic() + args.seconds, 0, [], []
    kernels: dict[str, int] = {}
    for shape in QUICK if args.quick else SHAPES:
        for spec in args.specs:
            if spec == "q4_k" and shape[1] % 256:
                continue
            if time.monotonic() > end:
                left.append(f"{spec} {shape}")
                continue
            began = time.monotonic()
            for name, error, broken in products(spec, shape, args.device, (5, 40) if args.quick else ROWS):
                checks += 1
                used = name.split(") ", 1)[1].split(",")[0]
                kernels[used] = kernels.get(used, 0) + 1
                if broken or not error <= LIMIT:
                    failures.append(f"{name}: relative error {error:.1e}, {broken} guards written")
                    print("FAIL", failures[-1], flush=True)
            print(f"{spec} {shape}: {checks} products, {time.monotonic() - began:.1f} s", flush=True)
    found = {"machine": machine(), "checks": checks, "kernels": kernels, "failures": failures, "not_begun": left}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{checks - len(failures)} of {checks} products right, guards whole; by {kernels}; not begun: {left}")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
