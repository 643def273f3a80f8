"""The measurements of two visits to a GPU as one page: what is dispatched now, the goals, and all that was timed.

    python benchmarks/gpu_report.py FIRST SECOND

FIRST and SECOND are folders that gpu_kernels.py filled: FIRST with rules of thumb for configurations, before any was
tuned; SECOND with the streaming configurations that the first visit found, and the tiled ones found in the same run.
Nothing is measured here: a cell without a measurement of the way that is dispatched now stays empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whit.formats import parse_format
from whit.kernels.gpu import stream, tuned

from gpu_kernels import ROWS, SPECS, table
from gpu_tune import SHAPES
from harness import RESULTS, markdown

H100 = (9, 132)
STREAMED_FIRST, STREAMED_SECOND = 64, 16  # rows up to which the public path streamed, and multiplied by tiles after
TILED_SECOND = 128
Cell = tuple[str, str, tuple[int, int], int]  # way, format, shape, rows
Shape = tuple[int, int]


def way_of(entry: Mapping[str, Any], visit: int) -> str | None:
    """By which way a measured row went; None for peers and for what is not a product of the public path."""
    rows = entry["rows"]
    if entry["kernel"] == "whit tiled":
        return "tiled"
    if entry["kernel"] != "whit":
        return None
    few, more = ((STREAMED_FIRST, 0), (STREAMED_SECOND, TILED_SECOND))[visit]
    return "stream" if rows <= few else "tiled" if rows <= more else "dequantize"


def cells(visits: Sequence[Mapping[str, Any]]) -> dict[Cell, tuple[float, int]]:
    """The ratio to bf16 in the same run, and the visit; the second's where both measured the same way."""
    found: dict[Cell, tuple[float, int]] = {}
    for visit, measured in enumerate(visits):
        for entry in measured["rows"]:
            way = way_of(entry, visit)
            if way is not None:
                named = way, entry["format"], tuple(entry["shape"]), entry["rows"]
                found[named] = entry["ratio_to_bf16"], visit
    return found


def dispatched(measured: Mapping[Cell, tuple[float, int]]) -> list[dict[str, Any]]:
    """What is dispatched now, where that was measured."""
    found = []
    for spec in SPECS:
        for shape in SHAPES:
            scheme = stream.scheme(parse_format(spec), shape[1])
            assert not isinstance(scheme, str)
            for rows in ROWS:
                way = tuned.route(scheme, shape, rows, H100)
                if (way, spec, shape, rows) in measured:
                    ratio, visit = measured[way, spec, shape, rows]
                    named = {"format": spec, "shape": list(shape), "rows": rows, "way": way}
                    found.append(named | {"ratio_to_bf16": ratio, "visit": visit + 1})
    return found


def dispatch_table(entries: Sequence[Mapping[str, Any]], shape: Shape) -> str:
    body = []
    for spec in SPECS:
        by_rows = {e["rows"]: e for e in entries if e["format"] == spec and e["shape"] == list(shape)}
        shown = [by_rows.get(n) for n in ROWS]
        body.append([spec, *("" if e is None else text(e) for e in shown)])
    return markdown([f"{shape[0]}x{shape[1]}", *(f"rows {n}" for n in ROWS)], body)


def text(entry: Mapping[str, Any]) -> str:
    return f"{entry['ratio_to_bf16']:.2f} {entry['way'][0]}" + ("*" if entry["visit"] == 1 else "")


GOALS = (
    ("faster than bf16 at one row", ("int4-g128", "nf4", "int8", "int3-g128", "int2-g64"), (1,), 1.0),
    ("3.2 times bf16 at one row", ("int4-g128", "nf4"), (1,), 3.2),
    ("faster than bf16 at 16 rows", ("int4-g128", "nf4", "int8"), (16,), 1.0),
    ("faster than bf16 at 64 rows", ("int4-g128", "nf4", "int8"), (64,), 1.0),
    ("not slower than bf16 from 256 rows on", ("int4-g128", "nf4"), (256, 1024, 4096), 1.0),
)


def goals(entries: Sequence[Mapping[str, Any]], visit: Mapping[str, Any]) -> str:
    """Each goal beside what was measured, and on which shapes it is reached."""
    body = []
    for name, specs, rows, least in GOALS:
        for spec in specs:
            chosen = [e for e in entries if e["format"] == spec and e["rows"] in rows]
            body.append([f"{name}: {spec}", *verdict([(e["ratio_to_bf16"], least) for e in chosen])])
    peer = {
        (tuple(e["shape"]), e["rows"]): e["ratio_to_bf16"] for e in visit["rows"] if e["kernel"] == "torch tinygemm"
    }
    for n in ROWS[:6]:
        chosen = [e for e in entries if e["format"] == "int4-g128" and e["rows"] == n]
        pairs = [(e["ratio_to_bf16"], peer[tuple(e["shape"]), n]) for e in chosen]
        body.append([f"faster than torch's int4 kernel, rows {n}: int4-g128", *verdict(pairs)])
    return markdown(["goal", "measured, times bf16", "reached"], body)


def verdict(pairs: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """The range of what was measured, and how many of the (measured, wanted) reach what is wanted."""
    reached = sum(value >= wanted for value, wanted in pairs)
    said = "reached" if reached == len(pairs) else f"in {reached} of {len(pairs)}" if reached else "not reached"
    values = [value for value, _ in pairs]
    return f"{min(values):.2f} to {max(values):.2f}", said


def page(visits: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]], checked: Sequence[int]) -> str:
    """The whole of gpu_kernels.md."""
    machine, limits = visits[1]["machine"], [v["limits"] for v in visits]
    bounds = [
        [
            f"visit {i + 1}",
            f"{v['read'] / 1e12:.2f} TB/s",
            f"{v['copy'] / 1e12:.2f} TB/s",
            f"{v['matmul'] / 1e12:.0f} TFLOP/s",
        ]
        for i, v in enumerate(limits)
    ]
    tables = ["\n\n".join(table(v["rows"], shape) for shape in SHAPES) for v in visits]
    return "\n\n".join((
        "# Products of packed weights on a GPU: streaming, tiles and dequantizing",
        SINCE,
        f"{machine['gpu']}, {machine['cores']} cores of {machine['cpu']}, torch {machine['torch version']}, bfloat16. "
        "Every call has weights of its own, more than 400 MB in all, so that the L2 cache is cold; all calls are in "
        "one CUDA graph; medians. Figures are times torch's bf16 product in the same run (its microseconds in "
        "brackets); GB/s are bytes of the weight at one row, in brackets the share of the measured read bandwidth, and "
        "for `dequantize` bytes read and written, as a share of the copy's.",
        f"`python benchmarks/gpu_kernels.py` with --check, --tune, --tune-tiled and --time, on two visits; "
        f"`python benchmarks/gpu_report.py` made this page. Correct against float64: {checked[0]} checks passed of "
        f"{checked[0]} on the first visit (streaming, dequantizing, torch's promises), {checked[1]} of {checked[1]} on "
        "the second (tiled).",
        markdown(["measured ceilings", "read", "copy", "bf16 product"], bounds),
        "## What was dispatched then\n\nThe way that kernels/gpu/tables.py took, each cell as it was measured on its "
        "own (this dispatch was not timed as a whole). s: streaming, t: tiled, d: dequantize and torch's product. "
        "`*`: from the first visit, so what streams there does it in a configuration from before the tuning. Empty: "
        "not measured that way.",
        *(dispatch_table(entries, shape) for shape in SHAPES),
        "## Beside the goals\n\nOver the four shapes. int4-g128 has 4.125 bits per weight for bf16's 16, and nf4 with "
        "groups of 64 and float32 scales 4.5: 3.9 and 3.6 are the most where memory is the limit.",
        goals(entries, visits[1]),
        NOTES,
        "## Second visit\n\n`whit` streams up to 16 rows (configurations that the first visit found), takes tiles up "
        "to 128 and dequantizes from there. `whit tiled` is the tiled kernel alone: for int4-g128 from 32 rows on with "
        "configurations tuned in the same run, all else with rules of thumb.",
        tables[1],
        "## First visit\n\nBefore tuning: rules of thumb for all configurations. `whit` streams up to 64 rows and "
        "dequantizes from there.",
        tables[0],
    )) + "\n"  # fmt: skip


SINCE = """\
**A page of an earlier version.** It measured three ways: `stream.cu`, `tiled.cu`, and `dequantize.cu` with torch's
product. They are still there, for other devices and formats, and for what the tables leave to them; on Hopper `few.cu`,
`slab.cu` and `many.cu` have since taken most products of up to 16 rows and of codes of 4 bits: see
[decode_gpu.md](decode_gpu.md), [gpu_slab.md](gpu_slab.md) and [gpu_many.md](gpu_many.md)."""

NOTES = """## What is not right yet

- While tiles were tuned, two configurations with six stages, three splits and three blocks per multiprocessor
  (int4-g128, 32 rows, 14336x4096) gave results that are not finite. The cause is not known; the CPU's emulation of the
  same cut, without Hopper's instructions, is right. None that is dispatched has more than four stages; so for
  int4-g128 at 32 rows of 28672x8192, where six were fastest, the tables have the next one (63.4 instead of 63.2
  microseconds when tuned; the cell above is of the former).
- Tiles were tuned for int4-g128 only, each cut compared with a reference: time ran out for the other formats. Theirs,
  and all at 16 rows, are rules of thumb, timed but not compared in those very cuts: the checks have five cuts, in
  twelve formats.
- Only the first visit timed nf4-dq, int4-g64-asym and int1-g128, none of them with tiles. The first two have tuned
  streaming configurations since, which were not timed beside bf16.
- The second visit's checks were those of the tiled kernel; streaming moved into shared files between the visits and was
  timed there, but not compared with float64 again on a GPU (the tests do, on the CPU's emulation)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    given = parser.parse_args()
    folders = (given.first, given.second)
    visits = [json.loads((folder / "gpu_time.json").read_text()) for folder in folders]
    checks = [json.loads((folder / "gpu_check.json").read_text()) for folder in folders]
    if any(check["failures"] for check in checks):
        raise SystemExit("a check failed: the figures are of no use; repair the kernel first")
    tuned_tiles = json.loads((given.second / "gpu_tune_tiled.json").read_text())
    entries = dispatched(cells(visits))
    problems = [t for t in tuned_tiles["tuned"] if t["problems"]]
    named = [visit | {"checks": check} for visit, check in zip(visits, checks, strict=True)]
    result = {"dispatched": entries, "visits": named, "tuning_problems": problems}
    (RESULTS / "gpu_kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "gpu_kernels.md").write_text(page(visits, entries, [check["passed"] for check in checks]))


if __name__ == "__main__":
    main()
