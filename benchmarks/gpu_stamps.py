"""When the blocks of many.cu's products come to each of their points, in a chain of products whose weights are cold.

    python benchmarks/gpu_stamps.py int8-g128,4096,4096,64,2:8:5:4:1:0:1:8:0:1

Each argument: format, outs, columns, rows, and a cut (the fields of many.Config). The kernel is built with stamps of
the GPU's clock in it; a point's times are microseconds after the last block of the product before has ended: the first
block's, the median, the last one's, and how many blocks come there. results/gpu_many.md tells what was seen.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from gpu_many_checks import one, scheme_of, wanted
from whit.kernels.gpu import many, nvrtc
from whit.kernels.gpu.many import Config
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

from gpu_harness import random_weights, random_x, relative_error, seconds_cold

PRODUCTS, BLOCKS, POINTS = 64, 1024, 16
POINT = {  # its number in the kernel, in the order of time
    "begins": 0, "has barriers": 1, "may read x": 2, "first codes": 3, "first x": 4, "last codes": 9, "last x": 11,
    "multiplied": 5, "handed over": 12, "others' added": 13, "sums laid": 6, "counted": 7, "added": 8, "ends": 10,
}  # fmt: skip
MEMORY = f"""
__device__ unsigned long long stamps[{PRODUCTS * BLOCKS * POINTS}];
#define STAMP(i) {{ unsigned long long now; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now) :: "memory"); \\
    stamps[(p.product * {BLOCKS}ull + blockIdx.x) * {POINTS} + (i)] = now; }}
#define CHUNK 32
"""
SPARE = """
        if (TRADED && tid == CONSUMERS + 32) {
            for (int i = 0; i < b.steps; i++) { await(b.full + i % STAGES, i / STAGES & 1); if (i == 0) STAMP(3) }
            STAMP(9)
        }
        if (TRADED && tid == CONSUMERS + 64) {
            for (int i = 0; i < b.steps * PIECES; i++) { await(b.ready + i % LEAD, i / LEAD & 1); if (i == 0) STAMP(4) }
            STAMP(11)
        }
"""
# What stands in the kernel, and what is put before and after it; {i} is a stamp of the first thread.
READS_X = "    for (int i = 0; i < min(pieces, LEAD); i++) {  // turn about"
COUNTS = "    if (tid == 0) *before = atomicAdd(p.arrived + tile, 1u);\n"
PLACES = (
    ("#define CHUNK 32\n", MEMORY, ""),
    ("    if (shared_address(shared) & 1023) __trap();\n", "", "{0}"),
    ("    int warp = uniform(tid >> 5);\n    if (warp < 4 * WG) {\n", "{1}", ""),
    (READS_X, "    STAMP(2)\n", ""),
    ("        if (tid == CONSUMERS) produce(p, b);\n", "", SPARE),
    ("        Tile done = tile;\n", "", "{5}"),
    ("        hand_over(b, sums, tid);\n", "", "{12}"),
    ("        add_handed(b, sums, tid);\n", "", "{13}"),
    (COUNTS, "{6}", "{7}"),
    ("    if (tid == 0) p.arrived[tile] = 0;\n", "", "{8}"),
    ("        finish(part, done, p.rows, sums, then, done.out + warp * 16, b.share);\n", "", "{10}"),
)


def stamped(text: str) -> str:
    """The kernel's source with stamps; ValueError where it has changed."""
    for line, before, after in PLACES:
        if text.count(line) != 1:
            raise ValueError(f"many.cu has {text.count(line)} times: {line}")
        first, then = (re.sub(r"^{(\d+)}$", r"if (tid == 0) STAMP(\1)\n", each) for each in (before, after))
        text = text.replace(line, first + line + then)
    return text.replace("    int columns, rows;\n};\nstruct Tile", "    int columns, rows, product;\n};\nstruct Tile")


def chain(
    x: Tensor, weights: list[PackedWeight], scheme: Scheme, config: Config, function: nvrtc.Function
) -> tuple[list[nvrtc.Launch], list[object]]:
    """A launch for each weight, which knows its number, and what must live as long."""
    launches: list[nvrtc.Launch] = []
    kept: list[object] = []
    for number, weight in enumerate(weights[:PRODUCTS]):
        products = [many.Product(weight, None, torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device))]
        room = many.meeting(x, products, config)
        argument = many.params(x, products, scheme, config, room=room)
        argument.rest[0] = number
        grid = config.grid([weight.shape[0]], len(x), nvrtc.processors(0))
        shared = config.shared_bytes(bool(scheme.storage.levels))
        launches.append(function.cut(grid, config.threads, shared, argument, config.cluster))
        kept += [products, room]
    return launches, kept


def read(function: nvrtc.Function, products: int, blocks: int) -> Tensor:
    """The stamps in nanoseconds, as (products, blocks, points); 0: none."""
    address, size = ctypes.c_uint64(), ctypes.c_size_t()
    where = ctypes.byref(address), ctypes.byref(size), function.module, b"stamps"
    nvrtc.checked(nvrtc.driver().cuModuleGetGlobal_v2(*where), "stamps")
    found = torch.empty(PRODUCTS, BLOCKS, POINTS, dtype=torch.int64)
    nvrtc.checked(nvrtc.driver().cuMemcpyDtoH_v2(ctypes.c_void_p(found.data_ptr()), address, size), "stamps")
    return found[:products, :blocks]


def times(stamps: Tensor) -> dict[str, list[float]]:
    """Of each point: microseconds of the first block, the median and the last, and blocks; medians over products."""
    at = stamps.double()
    at[stamps < stamps[:, :, :1]] = float("nan")  # of a product before, or none
    ends = at[:, :, POINT["ends"]].nan_to_num(0).amax(1)
    after = (at[1:] - ends[:-1, None, None])[2:-2] / 1e3
    found = {}
    for name, point in POINT.items():
        each = after[:, :, point]
        if each.isnan().all():
            continue
        three = each.nanquantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.double), 1).nanmedian(1).values
        found[name] = [*(round(v, 2) for v in three.tolist()), int((~each.isnan()).sum(1).median())]
    return found


def measure(spec: str, shape: tuple[int, int], rows: int, config: Config) -> dict[str, object]:
    """What a cut takes with stamps and without, its error, and its points."""
    scheme, generator = scheme_of(spec, shape[1]), torch.Generator("cuda").manual_seed(0)
    weights, x = random_weights(spec, shape, generator), random_x(rows, shape[1], generator)
    y = one(x, weights[0], None, scheme, config)
    plain = seconds_cold([lambda w=w: one(x, w, None, scheme, config) for w in weights], 9)  # type: ignore[misc]
    macros = [f"-D{key}={value}" for key, value in config.macros(scheme, False).items()]
    code = nvrtc.compile_source(stamped(nvrtc.text(many.SOURCE)), macros, nvrtc.architecture(0))
    function = nvrtc.Function(code, "many", 0)
    launches, kept = chain(x, weights, scheme, config, function)
    calls = [lambda launch=launch: launch.start(nvrtc.stream_on(0)) for launch in launches]
    with_stamps = seconds_cold(calls, 9)
    found = times(read(function, len(launches), config.grid([shape[0]], rows, nvrtc.processors(0))[0]))
    del kept
    error = relative_error(y, wanted(x, weights[0]))
    return {
        "format": spec, "shape": shape, "rows": rows, "cut": config.values, "microseconds": round(plain * 1e6, 2),
        "with stamps": round(with_stamps * 1e6, 2), "error": error, "points": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cuts", nargs="+")
    parser.add_argument("--out", type=Path)
    given, every = parser.parse_args(), []
    for cut in given.cuts:
        spec, outs, columns, rows, fields = cut.split(",")
        found = measure(spec, (int(outs), int(columns)), int(rows), Config(*map(int, fields.split(":"))))
        every.append(found)
        points = found.pop("points")
        print(*(f"{name} {value}" for name, value in found.items()), sep=", ", flush=True)
        assert isinstance(points, dict)
        for name, (first, median, last, blocks) in points.items():
            print(f"    {name:14}{first:8.2f}{median:8.2f}{last:8.2f}{blocks:6}", flush=True)
        found["points"] = points
    if given.out:
        given.out.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()
