"""Every way of the compiled kernels to multiply beside the others: python benchmarks/cpu_ways.py --rows 1 4 16 64

From how many rows on a way pays is decided by this: `stream` (codes past rows of bfloat16; in float32 on an Intel),
`float` (in float32), `strips`, `tiles` (by AMX, from 5 rows on), `folded` (tiles of rounded inputs and weights); with
inputs in int8 per 32 columns `few8` and `strips8`, with one scale for a row `few8r`, `strips8r` and `tiles8r` (by AMX,
from 32 rows on). Weights are cold, ways take turns; medians in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from whit.activations import parse_activations
from whit.arrays import quantize_tensor
from whit.evaluation.kernel_speed import copies_of, measure_limits, turn_of
from whit.kernels.activated import product_format
from whit.kernels.cpu.kernel import compiled_library
from whit.kernels.cpu.memory import in_huge_pages
from whit.kernels.cpu.rows8 import levels_of
from whit.kernels.cpu.weight import CpuWeight, plan_weight
from whit.layouts import BITS

import harness

FORMATS = ("int4-g128", "nf4", "int8-channel", "q4_k", "int2-g64")
ROWS = (1, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)
WAYS = ("stream", "float", "strips", "tiles", "folded", "few8", "strips8", "few8r", "strips8r", "tiles8r")
FLOATS, PAIRS, AMX, BF16, STREAMED = 2, 3, 4, 1, 64  # numbers of instruction sets and of the type; rows that stream

Way = Callable[[CpuWeight], int]  # 0, or what the library says where it cannot


def way_of(name: str, format: str, x: torch.Tensor, out: int) -> Way | None:
    """One way as a function of the weight, or None where it is not for these."""
    library, threads, count = compiled_library(), torch.get_num_threads(), len(x)
    y = torch.empty(count, out, dtype=x.dtype)
    isa = AMX if "amx" in library.isas else PAIRS
    ends = (count, BF16)
    if name in ("stream", "float") and count <= STREAMED:
        number = PAIRS if name == "stream" else FLOATS
        return lambda w: library.linear(w.address, x.data_ptr(), None, y.data_ptr(), *ends, number, threads)
    if name in ("strips", "tiles") and (name == "strips" or isa == AMX):
        number = AMX if name == "tiles" else PAIRS
        return lambda w: library.many(w.address, x.data_ptr(), None, y.data_ptr(), *ends, number, threads, 0)
    if name == "folded" and isa == AMX:
        z, (_, columns) = torch.empty_like(x), x.shape

        def folded(w: CpuWeight) -> int:
            rounding = (x.data_ptr(), count, columns, BF16, 32, z.data_ptr(), BF16, library.parallel, PAIRS, threads)
            library.round(*rounding)
            return library.many(w.address, z.data_ptr(), None, y.data_ptr(), *ends, AMX, threads, 1)

        return folded
    grouped, few = not name.endswith("r"), STREAMED if name.startswith("few8") else 0
    levels = levels_of(product_format(_packed(format)))
    if "8" not in name or isinstance(levels, str) or (few and count > STREAMED):
        return None
    if not grouped and not format.endswith("channel"):
        return None
    how = (levels.table, levels.shift, levels.unit, few, 3 if name == "tiles8r" else 2, threads)
    return lambda w: library.linear8(w.address, x.data_ptr(), count, grouped, None, y.data_ptr(), BF16, *how)


def _packed(format: str, shape: tuple[int, int] = (16, 256)) -> CpuWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    packed = replace(BITS.pack(quantize_tensor(weight, format)), activations=parse_activations("int8-g32"))
    return plan_weight(packed, compiled_library(), move=True)


def measured(format: str, rows: list[int], args: argparse.Namespace) -> list[dict[str, object]]:
    """Microseconds of each way at each number of rows, beside the bfloat16 product and the time to read the codes."""
    shape, found = tuple(args.shape), []
    one = _packed(format, shape)
    tensors = [{k: t.clone() for k, t in one.tensors.items()} for _ in range(copies_of(one.nbytes))]
    copies = [plan_weight(replace(one, tensors=some), compiled_library(), move=True) for some in tensors]
    plain = [in_huge_pages(torch.randn(shape).bfloat16()) for _ in range(copies_of(2 * shape[0] * shape[1]))]
    for count in rows:
        x = torch.randn(count, shape[1]).bfloat16()
        turns = {"bf16": turn_of([lambda x, w=w: torch.nn.functional.linear(x, w) for w in plain], x)}
        for name in args.ways:
            way = way_of(name, format, x, shape[0])
            if way is not None and way(copies[0]) == 0:
                turns[name] = turn_of([lambda x, w=w, way=way: way(w) for w in copies], x)
        took: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(args.rounds + 1):
            for name, run in turns.items():
                took[name] += run(args.turn) if turn else run(args.turn)[:0]
        us = {name: 1e6 * statistics.median(seconds) for name, seconds in took.items()}
        floor = 1e6 * one.nbytes / measure_limits().read_bytes_per_second
        found.append({"format": format, "rows": count, "read_us": floor, "us": us})
        print(format, count, f"{floor:.0f}", *(f"{name} {v:.0f}" for name, v in us.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--shape", nargs=2, type=int, default=(4096, 4096))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=0.05, help="seconds of a way's turn")
    parser.add_argument("--name", default="cpu_ways", help="of the files in results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = [one for format in args.formats for one in measured(format, list(args.rows), args)]
    header = ("weight", "rows", "read", "bf16", *args.ways)
    lines = []
    for one in found:
        us = one["us"]
        assert isinstance(us, dict)
        cells = (f"{us[name]:.0f}" if name in us else "" for name in ("bf16", *args.ways))
        lines.append((str(one["format"]), str(one["rows"]), f"{one['read_us']:.0f}", *cells))
    harness.save(args.name, {"machine": harness.machine(), "rows": found}, harness.markdown(header, lines))


if __name__ == "__main__":
    harness.wait_as_usual()
    main()
