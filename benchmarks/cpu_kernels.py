"""Products with packed weights on the processor: python benchmarks/cpu_kernels.py

One process, cold weights, all kernels of a case in turn; medians, ratio to torch's bfloat16 product, share of the
limit of this machine. Writes results/cpu_kernels.json and results/cpu_kernels.md. About 15 minutes on two quiet cores;
five with --shapes 1 --rounds 3. --formats takes any, such as q4_k and q6_k.
"""

from __future__ import annotations

import argparse

import torch

from whit.evaluation.kernel_speed import FORMATS, HEADER, ROWS, SHAPES, measure, measure_limits, table
from whit.kernels.cpu import library

import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first ones")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compiled = library()
    limits = measure_limits()
    speeds = []
    for shape in SHAPES[: args.shapes]:
        for rows in args.rows:
            for format in args.formats:
                if rows == 1 or shape == SHAPES[0]:
                    speeds += measure(format, shape, rows, limits, args.rounds)
                    print(*(" ".join(line) for line in table(speeds[-5:])), sep="\n", flush=True)
    after = measure_limits()
    read = [limit.read_bytes_per_second / 1e9 for limit in (limits, after)]
    flops = [limit.matmul_flops / 1e12 for limit in (limits, after)]
    note = (
        f"\n{args.threads} threads, weights cold, activations bfloat16, medians of {args.rounds} interleaved rounds. "
        f"The machine read {read[0]:.1f} GB/s before and {read[1]:.1f} after, and multiplied {flops[0]:.2f} and "
        f"{flops[1]:.2f} TFLOP/s in bfloat16; shares are of the first."
    )
    result = {
        "machine": harness.machine() | {"kernels": compiled if isinstance(compiled, str) else list(compiled.isas)},
        "limits": {"read_gb_per_second": read, "matmul_tflops": flops},
        "rows": [speed.as_json() for speed in speeds],
    }
    harness.save("cpu_kernels", result, harness.markdown(HEADER, table(speeds)) + "\n" + note)


if __name__ == "__main__":
    main()
