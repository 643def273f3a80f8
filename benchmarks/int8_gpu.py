"""Eight-bit activations on a Hopper GPU: python benchmarks/int8_gpu.py [--seconds 90] [--out results/int8_gpu.json]

First checks, each kind in a process of its own, so that one that hangs or faults is told and the others go on: W8A8
equals torch._int_mm and the CPU's functions bit for bit; LLM.int8() with planted outlier columns, more of them than lie
in shared memory at a time, and all columns; rows with zero points; FP8; CUDA graphs, torch.compile, and that nothing
waits for the device. Then times: cold weights (more than 400 MB of distinct ones in each CUDA graph), medians, beside
torch's bf16 product in the same run, as products are dispatched (with --cuts every cut that may be the best, too), with
the share of the limit: bytes of the weight at the memory's rate, or operations at the tensor cores', whichever takes
longer. FP8 is torch's product, its rows quantized by this package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_harness import Budget
from harness import RESULTS, machine, markdown
from int8_checks import CHECKS
from int8_times import DOUBTED, time_all

GOALS = {
    "W8A8": {1: 1.8, 16: 1.8, 64: 1.8, 4096: 1.6},
    "LLM.int8()": {1: 1.6, 16: 1.6, 64: 1.6, 256: 1.0, 1024: 1.0, 4096: 1.4},
}


def run_part(part: str, seconds: float, cuts: bool) -> None:
    if part == "times":
        time_all(seconds, cuts)
        return
    for label, error, allowed in CHECKS[part]():
        print("CHECK " + json.dumps([part, label, error, error <= allowed]), flush=True)


def start_part(part: str, seconds: float, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--part", part, "--seconds", str(seconds), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    """What a part printed, and how it ended where that was not well."""
    try:
        text, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        return (process.communicate()[0] or "") + "\nFAILED: it took too long\n"
    return text + (f"\nFAILED: status {process.returncode}\n" if process.returncode else "")


def is_wrong(text: str) -> bool:
    """Whether a part that ran did not end well, or found something wrong."""
    found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("CHECK ")]
    return "FAILED" in text or not all(each[3] for each in found)


def table(cells: list[dict[str, Any]]) -> str:
    """Times bf16, and in brackets the share of the limit."""
    lines = []
    for cell in cells:
        if "rows" in cell:
            speeds = [
                f"{cell['bf16'] / cell[name]:.2f} ({100 * cell['limit'] / cell[name]:.0f} %)"
                for name in ("W8A8", "LLM.int8()", "FP8")
            ]
            lines.append(("{}x{}".format(*cell["shape"]), str(cell["rows"]), f"{1e6 * cell['bf16']:.1f}", *speeds))
    return markdown(("shape", "rows", "bf16, µs", "W8A8", "LLM.int8()", "FP8 W8A8"), lines)


def page(result: dict[str, Any]) -> str:
    """What is committed beside the JSON."""
    checks, cells = result["checks"], [c for c in result["cells"] if "rows" in c]
    missed = [
        f"{name} {outs}x{columns} at {rows} rows: {cell['bf16'] / cell[name]:.2f} of {goal}"
        for name, goals in GOALS.items()
        for cell in cells
        for (outs, columns), rows in [(cell["shape"], cell["rows"])]
        if (goal := goals.get(rows)) and cell["bf16"] / cell[name] < goal
    ]
    met = sum(cell["rows"] in goals for goals in GOALS.values() for cell in cells) - len(missed)
    where = f"{result['machine'].get('gpu')}, torch {result['machine']['torch version']}"
    return (
        f"{where}, `python benchmarks/int8_gpu.py`.{result.get('note', '')} Times bf16 (torch's product in the same "
        "run), as they are dispatched, rows quantized included (FP8's by this package, and multiplied by torch); in "
        "brackets the share of what the memory's rate or the tensor cores' allow. "
        f"{sum(c[3] for c in checks)} checks of {len(checks)} passed.\n\n"
        f"{table(cells)}\n\n{met} goals met; not met: {'; '.join(missed) or 'none'}.\n"
    )


def others(out: Path) -> list[dict[str, Any]]:
    """What was kept of other devices, beside this run's JSON."""
    return [json.loads(path.read_text()) for path in sorted(out.parent.glob(f"{out.stem}_*.json"))]


def ways(cells: list[dict[str, Any]]) -> str:
    """Lines of kernels/gpu/int8_ways.py: the fastest of each cell."""
    lines = []
    for name, kind in (("int8", "cuts"), ("int8-outliers", "cuts, outliers")):
        for cell in (c for c in cells if kind in c):
            found = cell[kind]
            best = min(found, key=found.get)
            key = (name != "int8", cell["rows"], tuple(cell["shape"]))
            lines.append(f"    {key}: {best},  # {1e6 * found[best]:.1f} us, bf16 {1e6 * cell['bf16']:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--out", type=Path, default=RESULTS / "int8_gpu.json")
    parser.add_argument("--checks", default=",".join(CHECKS), help="which kinds, parted by commas")
    parser.add_argument("--cuts", action="store_true", help="time every cut that may be the best, too")
    parser.add_argument("--without", default="", help="of these cuts not the launch for one row (row), or thin")
    parser.add_argument("--ways", type=Path, help="print rows of kernels/gpu/int8_ways.py from such a JSON")
    parser.add_argument("--part", choices=[*CHECKS, "times"])
    args = parser.parse_args()
    if args.ways:
        print(ways(json.loads(args.ways.read_text())["cells"]))
        return
    if args.part:
        DOUBTED.update(args.without.split(","))
        run_part(args.part, args.seconds, args.cuts)
        return
    budget = Budget(args.seconds)
    running = {part: start_part(part, 40) for part in args.checks.split(",") if part}
    texts = {part: finished(process, min(budget.left, 120)) for part, process in running.items()}
    print(f"checked after {args.seconds - budget.left:.0f} s", flush=True)
    wrong = [part for part in ("row", "plain") if is_wrong(texts.get(part, ""))]
    wrong += ["thin"] if "FAILED" in texts.get("thin", "") else []  # wrong times tell something
    options = ["--without", ",".join([args.without, *wrong]), *(["--cuts"] if args.cuts else [])]
    times = start_part("times", budget.left - 8, *options)
    texts["times"] = finished(times, budget.left - 1)
    lines = [line for text in texts.values() for line in text.splitlines()]
    checks = [json.loads(line[6:]) for line in lines if line.startswith("CHECK ")]
    cells = [json.loads(line[5:]) for line in lines if line.startswith("CELL ")]
    other = {
        part: [t for t in text.splitlines() if not t.startswith(("CHECK ", "CELL "))] for part, text in texts.items()
    }
    failed = [c for c in checks if not c[3]]
    result = {"machine": machine(), "checks": checks, "cells": cells}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join(map(page, [result, *others(args.out)])))
    for part, said in other.items():
        print(f"--- {part}", *said[-25:], sep="\n")
    print(f"{len(checks) - len(failed)} checks of {len(checks)} passed", *failed, sep="\n")
    print(table(cells))
    for cell in cells:
        print(json.dumps(cell))


if __name__ == "__main__":
    main()
