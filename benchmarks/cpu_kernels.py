"""Products with packed weights on the processor: python benchmarks/cpu_kernels.py [--peers DIR]

Cold weights, all kernels of a case in turn; medians, ratio to torch's bfloat16 product, share of the limit of this
machine, measured before and after: the faster counts. Writes results/cpu_kernels.json and results/cpu_kernels.md, or
--name. About 15 minutes on two quiet cores; five with --shapes 1 --rounds 3. --formats takes any, as q4_k.
--peers names the folder where `python benchmarks/peers/install.py DIR --peers kernels` put ONNX Runtime, OpenVINO,
auto-round-lib, torchao and ggml; each runs in a process of its own (`peers/kernels.py`) and takes its turns in the same
rounds. About twice the time then. OMP_WAIT_POLICY is not heeded (`harness.wait_as_usual`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

import torch

from peers.kernels import PEERS, Peer
from whit.evaluation.kernel_speed import (
    FORMATS,
    HEADER,
    READING,
    ROWS,
    SHAPES,
    Limits,
    Speed,
    Turn,
    copies_of,
    measure,
    measure_limits,
    table,
)
from whit.formats import parse_format
from whit.kernels.cpu import library

import harness

PAUSE = 0.01  # seconds after a peer's turn, in which its threads stop spinning
NO_PEERS = ("torch bf16", "reference", READING)


def turns_of(
    peers: Sequence[Peer], case: tuple[str, tuple[int, int], int], errors: dict[str, str]
) -> dict[str, tuple[Turn, int]]:
    """What the peers make of a case; what they cannot is put into `errors`."""
    format, shape, rows = case
    size = shape[0] * shape[1] * parse_format(format).bits // 8
    copies = copies_of(size) if rows <= 16 else 2

    def turn(peer: Peer) -> Turn:
        def run(seconds: float) -> list[float]:
            said = peer.ask(turn=seconds)
            time.sleep(PAUSE)
            if "error" in said:
                errors[f"{peer.name}, {format}, {rows} rows"] = said["error"]
            return list(said.get("seconds", ()))

        return run

    found = {}
    for peer in peers:
        if format not in peer.formats:
            continue
        said = peer.ask(format=format, shape=shape, rows=rows, copies=copies)
        if "error" in said:
            errors[f"{peer.name}, {format}"] = said["error"]
        else:
            found[peer.name] = turn(peer), int(said["bytes"])
    return found


def duels(speeds: Sequence[Speed]) -> list[tuple[str, ...]]:
    """For each case whit's fastest kernel beside the fastest peer."""
    cases: dict[tuple[str, tuple[int, int], int], list[Speed]] = {}
    for speed in speeds:
        if speed.kernel not in NO_PEERS:
            cases.setdefault((speed.format, speed.shape, speed.rows), []).append(speed)
    lines = []
    for (format, shape, rows), all_of in cases.items():
        ours = min((s for s in all_of if s.kernel.startswith("cpu")), key=lambda s: s.seconds, default=None)
        theirs = min((s for s in all_of if not s.kernel.startswith("cpu")), key=lambda s: s.seconds, default=None)
        if ours and theirs:
            lines.append(
                (f"{format} {shape[0]}x{shape[1]}", str(rows), ours.kernel, f"{1e3 * ours.seconds:.3f}", theirs.kernel,
                 f"{1e3 * theirs.seconds:.3f}", f"{theirs.seconds / ours.seconds:.2f}")
            )  # fmt: skip
    return lines


def of_limits(speed: Speed, limits: Limits) -> Speed:
    """The same with its share of other limits."""
    flops = 2 * speed.rows * speed.shape[0] * speed.shape[1]
    floor = max(speed.bytes / limits.read_bytes_per_second, flops / limits.matmul_flops)
    return replace(speed, share_of_limit=floor / speed.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first ones")
    parser.add_argument("--name", default="cpu_kernels", help="of the files in results/")
    parser.add_argument("--peers", type=Path, help="where install.py put them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compiled = library()
    limits = measure_limits()
    peers = [Peer(name, args.peers, args.threads) for name in PEERS] if args.peers else []
    errors: dict[str, str] = {}
    speeds: list[Speed] = []
    for shape in SHAPES[: args.shapes]:
        for rows in args.rows:
            for format in args.formats:
                if rows == 1 or shape == SHAPES[0]:
                    found = turns_of(peers, (format, shape, rows), errors)
                    new = measure(format, shape, rows, limits, args.rounds, others=found)
                    print(*(" ".join(line) for line in table(new)), sep="\n", flush=True)
                    speeds += new
    for peer in peers:
        peer.close()
    after = measure_limits()
    fastest = Limits(*(max(pair) for pair in zip(astuple(limits), astuple(after), strict=True)))
    speeds = [of_limits(speed, fastest) for speed in speeds]
    read = [limit.read_bytes_per_second / 1e9 for limit in (limits, after)]
    flops = [limit.matmul_flops / 1e12 for limit in (limits, after)]
    note = (
        f"\n{args.threads} threads, weights cold, activations bfloat16, medians of {args.rounds} interleaved rounds. "
        f"The machine read {read[0]:.1f} GB/s before and {read[1]:.1f} after, and multiplied {flops[0]:.2f} and "
        f"{flops[1]:.2f} TFLOP/s in bfloat16; shares are of the faster."
    )
    if peers:
        header = ("weight", "rows", "whit", "ms", "fastest peer", "ms", "whit is faster by")
        note += (
            " Peers take float32 activations where they know no bfloat16; a turn of theirs is one call over all of its "
            f"weights, divided by their number (2 beyond 16 rows).\n\n{harness.markdown(header, duels(speeds))}\n"
        )
        note += "".join(f"\n- {case}: {error}" for case, error in errors.items())
    result = {
        "machine": harness.machine() | {"kernels": compiled if isinstance(compiled, str) else list(compiled.isas)},
        "limits": {"read_gb_per_second": read, "matmul_tflops": flops},
        "rows": [speed.as_json() for speed in speeds],
        "errors": errors,
    }
    harness.save(args.name, result, harness.markdown(HEADER, table(speeds)) + "\n" + note)


if __name__ == "__main__":
    harness.wait_as_usual()
    main()
