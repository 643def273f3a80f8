"""Seconds to quantize one 4096 x 4096 float32 matrix: python benchmarks/quantize_speed.py

The floor is the time to read the matrix once and write one byte per weight, measured in the same run by torch's own
copy and cast. bitsandbytes' quantize_4bit runs beside NF4 where it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import whit
from whit.methods import METHODS

import harness

SPECS = ("int8", "int4-g128", "int4-g64-asym-fz", "int3-g64", "int2-g32", "nf4", "nf4-dq", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weight = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0))

    def job(spec: str, method: str) -> Callable[[], object]:
        return lambda: whit.quantize_tensor(weight, spec, method)

    free = [method.name for method in METHODS if not method.needs_stats]
    tasks = {f"{method} {spec}": job(spec, method) for spec in SPECS for method in free}
    tasks["floor"] = lambda: weight.to(torch.int8)
    if harness.installed("bitsandbytes") != "not installed":
        from bitsandbytes.functional import quantize_4bit

        tasks["bitsandbytes nf4"] = lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4")
    seconds = {name: harness.spread(values) for name, values in harness.interleaved(tasks, args.rounds).items()}
    header = ("format", *free, "bitsandbytes")
    rows = []
    for spec in SPECS:
        cells = [f"{s['median']:.3f} ({s['min']:.3f}-{s['max']:.3f})" for s in (seconds[f"{m} {spec}"] for m in free)]
        peer = seconds.get(f"bitsandbytes {spec}")
        rows.append((spec, *cells, f"{peer['median']:.3f}" if peer else ""))
    floor = seconds["floor"]["median"]
    note = f"\nSeconds, median of {args.rounds} interleaved rounds (min-max), {args.threads} threads."
    note += f" {args.size}^2 float32 read once, one byte a weight written: {floor:.3f} s."
    result = {"machine": harness.machine(), "size": args.size, "seconds": seconds}
    harness.save("quantize_speed", result, harness.markdown(header, rows) + "\n" + note)


if __name__ == "__main__":
    main()
