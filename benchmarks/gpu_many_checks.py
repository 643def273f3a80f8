"""What gpu_many.py checks before it times: cuts of the fused product for more rows, against float64."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.formats import parse_format
from whit.kernels import dequantize
from whit.kernels.gpu import launches, many, stream
from whit.kernels.gpu.many import Config
from whit.tensor import PackedWeight

from gpu_harness import Kitchen, random_packed, random_x, relative_error

SAME_BITS = ("int4-g128", "nf4", "int8-g128", "int8-channel", "int3-g128")  # in tiles of all heights
TOGETHER = ("int4-g128", "nf4", "int8-g128")
LIMIT = 5e-3
# Which cuts are checked, in which process: (format, rows, cut). Outs are ragged.
CHECKS = {
    "plain": [
        *((spec, rows, cut)
          for spec in ("int4-g128", "nf4", "nf4-dq", "int4-g64-asym", "fp4-g32")
          for rows, cut in ((16, Config(1, 2, 4, min_blocks=2)), (9, Config(2, 2, 4)), (60, Config(2, 8, 3, lead=8)),
                            (300, Config(2, 16, 2, lead=6)), (520, Config(2, 32, 2, lead=4)))),
        ("int4-channel", 130, Config(2, 16, 2, lead=6)), ("int4-g256", 64, Config(1, 8, 3, min_blocks=2, lead=4)),
    ],
    "late": [
        *((spec, rows, cut)
          for spec in ("int4-g128", "nf4", "nf4-dq", "int4-g64-asym")
          for rows, cut in ((16, Config(1, 2, 4, late=1, min_blocks=2)), (9, Config(2, 2, 4, late=1)),
                            (60, Config(2, 8, 3, late=1, lead=8)))),
    ],
    "split": [
        *((spec, rows, cut)
          for spec in ("int4-g128", "nf4")
          for rows, cut in ((16, Config(1, 2, 4, 4, late=1, min_blocks=2)), (9, Config(2, 2, 4, 2)),
                            (60, Config(2, 8, 3, 3, lead=8)), (250, Config(2, 16, 3, 2, lead=6)),
                            (33, Config(1, 4, 2, 8, min_blocks=2)), (60, Config(2, 8, 3, 4, lead=8, apart=1)),
                            (64, Config(2, 8, 2, 8, min_blocks=2, lead=4, apart=1)),
                            (120, Config(2, 16, 2, 4, lead=8, apart=2)), (250, Config(1, 32, 3, 2, lead=4, apart=2)),
                            (400, Config(2, 32, 2, 2, lead=4, apart=2)))),
    ],
    "pair": [
        *((spec, rows, cut)
          for spec in ("int4-g128", "nf4")
          for rows, cut in ((60, Config(2, 8, 3, pair=2, lead=8)), (300, Config(2, 16, 2, pair=2, lead=6)),
                            (520, Config(2, 32, 2, pair=2, lead=4)), (60, Config(2, 8, 2, 3, 2, lead=8)))),
    ],
    "boxes": [
        *((spec, rows, cut)
          for spec in ("int4-g128", "nf4", "nf4-dq", "int8-g128", "int8-channel", "int6-g128")
          for rows, cut in ((60, Config(2, 8, 3, lead=6, boxes=1)), (200, Config(2, 16, 2, lead=6, boxes=1)),
                            (520, Config(2, 32, 2, lead=4, boxes=2)), (600, Config(1, 32, 3, lead=4, boxes=2)),
                            (700, Config(2, 32, 2, pair=2, lead=4, halve=1, boxes=1)))),
    ],
    **{
        part: [
            *((spec, rows, cut)
              for spec in specs
              for rows, cut in ((9, Config(2, 2, 4, lead=6)), (60, Config(2, 8, 4, lead=8)),
                                (60, Config(2, 8, 3, 4, min_blocks=2, lead=4, apart=1)),
                                (30, Config(4, 4, 4, 8, lead=6, apart=1)), (300, Config(2, 16, 3, lead=6)),
                                (520, Config(2, 32, 2, lead=6)))),
            *((specs[0], rows, cut)
              for rows, cut in ((60, Config(2, 8, 3, pair=2, lead=8)), (250, Config(2, 16, 3, 2, lead=6)),
                                (520, Config(2, 32, 4, pair=2, lead=4, halve=1)), (60, Config(2, 8, 2, 3, 2, lead=8)))),
            *((spec, 120, Config(2, 16, 4, 4, lead=8, apart=2)) for spec in specs),
        ]
        for part, specs in {
            "bytes": ("int8-g128", "int8-channel", "int8-g64", "int8-g32", "int8-g64-asym"),
            "pairs": ("int2-g64", "int2-g128", "int2-channel", "int2-g64-asym"),
            "odd": ("int3-g128", "int5-g128", "int6-g128", "int3-g128-asym"),
        }.items()
    },
}  # fmt: skip


def scheme_of(spec: str, columns: int) -> stream.Scheme:
    found = stream.scheme(parse_format(spec), columns)
    assert not isinstance(found, str), found
    assert many.why_not(found, columns) is None
    return found


def one(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: stream.Scheme, cut: Config) -> Tensor:
    return launches.by_many(x, [packed], [bias], scheme, cut).start()[0]


def wanted(x: Tensor, packed: PackedWeight) -> Tensor:
    """In float64 for few rows; beyond, the rounding of float32 is far below that of bfloat16."""
    exact = torch.float64 if len(x) <= 64 else torch.float32
    return x.to(exact) @ dequantize(packed, torch.bfloat16).to(exact).T


def where_wrong(y: Tensor, right: Tensor) -> str:
    """How many numbers are wrong, in which rows and outs."""
    wrong = ~((y.to(right) - right).abs() < 0.05 * right.abs().max())
    at = wrong.nonzero().cpu()
    rows, outs = sorted(set(at[:, 0].tolist())), sorted(set(at[:, 1].tolist()))
    nan = int((~y.isfinite()).sum())
    wide = f"rows {rows[:12]}..{rows[-1:]}, outs {outs[:20]}..{outs[-1:]}"
    return f"{len(at)} of {y.numel()} wrong, {nan} not finite, {wide}"


def check(part: str) -> list[dict[str, Any]]:
    kitchen, shape = Kitchen(), (1096, 4096)
    torch.cuda.init()
    kitchen.prepare(
        (many.SOURCE, cut.macros(scheme_of(spec, shape[1]), False).items()) for spec, _, cut in CHECKS[part]
    )
    generator, found = torch.Generator("cuda").manual_seed(0), []
    bias = torch.randn(shape[0], device="cuda", generator=generator).bfloat16()
    for spec, rows, cut in CHECKS[part]:
        entry: dict[str, Any] = {"spec": spec, "rows": rows, "cut": astuple(cut)}
        found.append(entry)
        try:
            scheme = scheme_of(spec, shape[1])
            packed, x = random_packed(spec, shape, generator), random_x(rows, shape[1], generator)
            entry |= many.build(scheme, cut, False, 1, 0).resources()
            results = [one(x, packed, bias, scheme, cut) for _ in range(4)]
            torch.cuda.synchronize()
            right = wanted(x, packed) + bias.to(torch.float32)
            entry["error"], entry["same"] = (
                relative_error(results[0], right),
                all(torch.equal(results[0], y) for y in results),
            )
            if not entry["error"] < LIMIT or not entry["same"]:
                print("WRONG", entry, where_wrong(results[0], right), flush=True)
        except (KernelError, RuntimeError) as problem:
            print(f"FAIL {entry}: {str(problem)[:300]}", flush=True)
            if "CUDA error" in str(problem) or "launch" in str(problem):
                break
    good = [each for each in found if each.get("error", 1.0) < LIMIT and each["same"]]
    print(f"{part}: {len(good)} of {len(CHECKS[part])} right, largest {max((e['error'] for e in good), default=0):.1e}")
    if part == "plain":
        found += [{"invariant": invariance(generator)}, {"together": together(generator)}]
    kitchen.pool.terminate()
    return found


def invariance(generator: torch.Generator) -> dict[str, bool]:
    """Whether a row's result is the same bits in tiles of all heights, and at every place in them."""
    shape, same = (1096, 4096), {}
    for spec in SAME_BITS:
        scheme, packed = scheme_of(spec, shape[1]), random_packed(spec, shape, generator)
        x = random_x(256, shape[1], generator)
        every = [
            one(x, packed, None, scheme, Config(2, tiles, stages, lead=lead))
            for tiles, stages, lead in ((2, 4, 8), (4, 3, 6), (8, 3, 8), (16, 2, 6), (32, 2, 4))
        ]
        rolled = one(x.roll(13, 0).contiguous(), packed, None, scheme, Config(2, 32, 2, lead=4)).roll(-13, 0)
        same[spec] = all(torch.equal(every[0], each) for each in (*every, rolled))
        print(f"invariant {spec}: {same[spec]}", flush=True)
    return same


def together(generator: torch.Generator) -> dict[str, float]:
    """Errors of three weights in one launch."""
    found = {}
    tried = Config(1, 2, 4, 2, min_blocks=2), Config(2, 8, 3, pair=2, lead=8)
    for spec, cut in itertools.product(TOGETHER, tried):
        weights = [random_packed(spec, (outs, 4096), generator) for outs in (1096, 72, 512)]
        x, scheme = random_x(8 * cut.row_tiles - 3, 4096, generator), scheme_of(spec, 4096)
        ys = launches.by_many(x, weights, [None] * 3, scheme, cut).start()
        errors = [relative_error(y, wanted(x, weight)) for y, weight in zip(ys, weights, strict=True)]
        found[f"{spec} {astuple(cut)}"] = max(errors)
        print(f"together {spec} {astuple(cut)}: {errors}", flush=True)
    return found
