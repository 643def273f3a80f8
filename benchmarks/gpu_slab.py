"""The kernel for up to 16 rows whose blocks lie beside each other: checked against float64, then its cuts timed.

The cuts are those of tables_slab.py, early and late, in both orders of columns; with `--which dispatched` those that
are dispatched, with `--which wide` all that fill the device.

python benchmarks/gpu_slab.py --which dispatched --seconds 70 --out FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whit.errors import KernelError
from whit.kernels.gpu import halves, launches, slab, stream, tuned
from whit.kernels.gpu import kernel as gpu_kernel
from whit.kernels.gpu.tables_slab import HOPPER_SLAB
from whit.tensor import PackedWeight

from gpu_harness import (
    Budget,
    Kitchen,
    plain_seconds,
    random_packed,
    random_weights,
    random_x,
    ranked,
    relative_error,
    right_product,
    scheme_of,
    seconds_cold,
)
from harness import machine

RAGGED = 520  # outs of a weight that is checked
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
MULTIPROCESSORS = 132
MOST_THREADS = {16: 768, 32: 512, 64: 384, 128: 256}  # of a multiprocessor, by outs of a warp: what registers allow
FILLED = (0.7, 1.2)  # blocks by the room for them
FORMATS = ("int4-g128", "nf4", "nf4-dq", "int8", "int8-g128", "int4-g128-asym", "int3-g128", "int2-g64")
WORK = ",".join(f"{spec}:{rows}" for spec in FORMATS for rows in (16, 8, 4, 1))
# Other formats, with float16 as well, in these cuts: (outs, across, along, stages, splits, blocks, late, mixed).
OTHERS = (
    "int4-g128", "nf4", "nf4-dq", "int4-g64", "int4-g128-f16", "int4-g32-f32", "fp4-g32", "int4", "int8-g128", "int8",
    "int8-g64", "int2-g64", "int2-g128", "int3-g128", "int3",
)  # fmt: skip
OTHER_CUTS = ((64, 4, 1, 1, 1, 1), (128, 2, 2, 1, 2, 1), (32, 8, 1, 1, 1, 1), (64, 4, 1, 2, 4, 1, 1, 1))
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of relative errors
Shape = tuple[int, int]
Work = tuple[str, int]


def read_as(spec: str, shape: Shape) -> stream.Scheme:
    """How the kernel reads a weight for bfloat16: some have absmax in 16 bits."""
    scheme = scheme_of(spec)
    if not tuned.reads_halves(scheme, shape, 9):
        return scheme
    return replace(scheme, storage=replace(scheme.storage, scale=halves.FLOATS["f16"]))


def configs(spec: str, rows: int, shape: Shape, which: str) -> list[slab.Config]:
    """The cuts for a shape that fit a multiprocessor: `dispatched`, those `known` by the tables, or `wide`, all."""
    if which == "dispatched":
        best = tuned.best_slab(read_as(spec, shape), shape, rows, (9, MULTIPROCESSORS))
        return [best] if best else []
    scheme, kind = read_as(spec, shape), tuned.kind(slab.in_groups(read_as(spec, shape)))
    cuts = [slab.Config(*cut) for (name, _, at), cut in HOPPER_SLAB.items() if cut and (name, at) == (kind, shape)]
    every = itertools.product(cuts, (0, 1), (0, 1))
    known = (replace(cut, late=late, mixed=mixed) for cut, late, mixed in every if cut.splits > 1 or not mixed)
    found = filling(scheme, rows, shape) if which == "wide" else known
    return [config for config in dict.fromkeys(found) if config.fits(scheme, rows)]


def filling(scheme: stream.Scheme, rows: int, shape: Shape) -> Iterator[slab.Config]:
    """Cuts with as many blocks as fit, enough of them for the device and no more, each with columns for all stages."""
    sizes = itertools.product((0, 1), (32, 64, 128, 256), (1, 2, 4), (1, 2, 4, 8), (1, 2, 3, 4), (1, 2, 4, 7))
    for mixed, outs, along, across, stages, splits in sizes:
        threads, most = 32 * across * along, MOST_THREADS.get(outs // along, 0)
        if across * stages * splits * slab.SPAN > shape[1] or threads > 512 or mixed >= splits:
            continue
        every = [slab.Config(outs, across, along, stages, splits, n, 1, mixed) for n in range(most // threads, 0, -1)]
        config = next((each for each in every if each.fits(scheme, rows)), None)
        if config and FILLED[0] <= config.grid(shape[0])[0] / (MULTIPROCESSORS * config.blocks) <= FILLED[1]:
            yield config


def wrong(packed: PackedWeight, config: slab.Config, x: torch.Tensor, bias: torch.Tensor | None) -> str:
    """What is wrong with three products, or nothing."""
    try:
        scheme = halves.read_as(packed, scheme_of(str(packed.format)), x.dtype)
        ys = [launches.by_slab(x, [packed], [bias], scheme, config).start()[0] for _ in range(3)]
    except KernelError as problem:
        return f"FAIL {str(problem)[:150]}"
    error = relative_error(ys[0], right_product(x, packed, bias))
    if not all(torch.equal(y, ys[0]) for y in ys):
        return "other bits in another run"
    return "" if error < LIMITS[x.dtype] else f"relative error {error:.1e}"


def check(
    work: Sequence[Work], which: str, generator: torch.Generator
) -> dict[tuple[str, int, Shape, slab.Config], str]:
    """What is wrong with each cut: outs ragged, a bias, as many rows as each is built for, and fewer without a bias."""
    found: dict[tuple[str, int, Shape, slab.Config], str] = {}
    for (spec, rows), shape in itertools.product(work, SHAPES):
        packed, bias = random_packed(spec, (RAGGED, shape[1]), generator), random_x(1, RAGGED, generator)[0]
        if halves.reads_halves(read_as(spec, shape)):  # as a weight of that shape is
            packed = replace(packed, tensors={**packed.tensors, **halves.halved(packed.tensors["absmax"])})
        inputs = ((rows, bias), (max(rows * 3 // 4, 1), None))
        for config, (count, each) in itertools.product(configs(spec, rows, shape, which), inputs):
            key = spec, rows, shape, config
            found[key] = found.get(key, "") or wrong(packed, config, random_x(count, shape[1], generator), each)
            if found[key]:
                print("WRONG", key, found[key], flush=True)
    return found


def rows_of(cut: tuple[int, ...]) -> int:
    """Rows that another format's kernel is built for: some with room for 8, some for 16."""
    return 8 if cut[1] == 4 else 16


def check_others(generator: torch.Generator) -> dict[tuple[Any, ...], str]:
    """The same for other formats and float16."""
    found = {}
    for spec, dtype, cut in itertools.product(OTHERS, LIMITS, OTHER_CUTS):
        packed, rows = random_packed(spec, (1032, 4096), generator), rows_of(cut) - 3
        x, bias = random_x(rows, 4096, generator, dtype), random_x(1, 1032, generator, dtype)[0]
        found[spec, str(dtype), cut] = problem = wrong(packed, slab.Config(*cut), x, bias)
        if problem:
            print("WRONG", spec, dtype, cut, problem, flush=True)
    return found


def timed(
    spec: str, shape: Shape, rows: int, usable: Sequence[slab.Config], generator: torch.Generator
) -> dict[str, Any]:
    """Seconds of torch's bf16 product, of what is dispatched today and of each cut."""
    scheme, x = read_as(spec, shape), random_x(rows, shape[1], generator)
    plain, weights = plain_seconds(shape, rows, generator), random_weights(spec, shape, generator)
    today = seconds_cold([partial(gpu_kernel.product, x, w, None) for w in weights], 5)
    ranking = ranked(usable, lambda w, config: launches.by_slab(x, [w], [None], scheme, config).start(), weights)
    found = {"spec": spec, "shape": shape, "rows": rows, "bytes": nbytes(weights[0]), "plain": plain, "today": today}
    return found | {"ranking": [(seconds, astuple(config)) for seconds, config in ranking]}


def nbytes(packed: PackedWeight) -> int:
    """Bytes of the weight that are read: of absmax and its halves only these."""
    unread = "absmax" if halves.HALVES in packed.tensors else ""
    return sum(tensor.nbytes for name, tensor in packed.tensors.items() if name not in (unread, launches.ARRIVED))


def show(found: dict[str, Any]) -> None:
    """A line."""
    plain, today = found["plain"], found["today"]
    speed = f"{found['bytes'] / today / 1e9:5.0f} GB/s"
    times = f"bf16 {plain * 1e6:6.1f} today {plain / today:.2f}x {today * 1e6:6.1f} us {speed}"
    cuts = " ".join(f"{cut}:{plain / seconds:.2f}" for seconds, cut in found["ranking"])
    print(f"{found['spec']:10} {found['shape']!s:14} rows {found['rows']} {times} | {cuts}", flush=True)


def prepare(kitchen: Kitchen, work: Sequence[Work], which: str, others: bool) -> None:
    """Compile what is checked and timed."""
    every = {
        (read_as(spec, shape), config, False, slab.rounded(rows))
        for (spec, rows), shape in itertools.product(work, SHAPES)
        for config in configs(spec, rows, shape, which)
    }
    if others:
        cuts = itertools.product(OTHERS, OTHER_CUTS, (False, True))
        every |= {(scheme_of(spec), slab.Config(*cut), half, rows_of(cut)) for spec, cut, half in cuts}
    kitchen.prepare((slab.SOURCE, config.macros(scheme, *case).items()) for scheme, config, *case in every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--others", action="store_true", help="check other formats and float16, too")
    parser.add_argument("--which", choices=("known", "dispatched", "wide"), default="known", help="cuts")
    parser.add_argument("--work", default=WORK, help="FORMAT:ROWS,...")
    given = parser.parse_args()
    work = [(spec, int(rows)) for spec, rows in (each.split(":") for each in given.work.split(",") if each)]
    kitchen, budget = Kitchen(), Budget(given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)
    prepare(kitchen, work, given.which, given.others)
    print(f"compiled {len(kitchen.done)}, {budget.left:.0f} s left", flush=True)
    problems, others = check(work, given.which, generator), check_others(generator) if given.others else {}
    every = [*problems.values(), *others.values()]
    print(f"slab: {every.count('')} of {len(every)} right, {budget.left:.0f} s left", flush=True)
    checked = [(*key, each) for key, each in (*problems.items(), *others.items())]
    result: dict[str, Any] = {"machine": machine(), "check": checked}
    entries = result["timed"] = []
    for (spec, rows), shape in itertools.product(work, SHAPES):
        if budget.left < 2:
            print(f"no time left for {spec} {rows} {shape}")
            continue
        usable = [
            config for config in configs(spec, rows, shape, given.which) if not problems[spec, rows, shape, config]
        ]
        if given.which == "dispatched" and not usable:
            continue
        entries.append(timed(spec, shape, rows, usable, generator))
        show(entries[-1])
        (given.out / "gpu_slab.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"done, {budget.left:.0f} s left", flush=True)
    kitchen.pool.terminate()


if __name__ == "__main__":
    main()
