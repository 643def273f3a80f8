"""What every benchmark shares: the machine, medians with their spread, and a JSON file beside one table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5  # of turns
PAUSE = 0.1  # seconds before a turn


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {f"{name} version": installed(name) for name in ("torch", "transformers")}


def wait_as_usual() -> None:
    """Start this program again without OMP_WAIT_POLICY, which OpenMP has read already.

    By default OpenMP's threads wait awake for a while, as those of other programs do. Asleep ("passive"), each product
    waits 30 to 60 microseconds for them.
    """
    if os.environ.pop("OMP_WAIT_POLICY", None):
        os.execv(sys.executable, [sys.executable, *sys.argv])


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def installed(package: str) -> str:
    """A package's version, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def interleaved(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round; tasks take turns so that all see the same noise. One warm-up each."""
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turns(
    tasks: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every task, in `seconds` for all together: ROUNDS turns each of calls in a row, the first not counted.

    A pause comes before each turn: the threads of some libraries (ONNX Runtime's) go on spinning for tens of
    milliseconds after a call, and would take processors from whoever comes next.
    """
    took: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            time.sleep(PAUSE)
            task()
            until = time.monotonic() + max(seconds / ROUNDS / len(tasks) - PAUSE, 0)
            while True:
                start = clock()
                task()
                took[name].append(clock() - start)
                if time.monotonic() > until:
                    break
    return took


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def save(name: str, result: Mapping[str, Any], table: str, folder: Path = RESULTS) -> None:
    """Write NAME.json and NAME.md into the folder, and show the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table + "\n")
    print(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def say_checks(checks: Sequence[tuple[str, bool]]) -> None:
    """Print how many were right, and the names of those that were not."""
    good = sum(right for _, right in checks)
    print(f"{good} of {len(checks)} right", *(name for name, right in checks if not right), sep="\n", flush=True)


def save_checked(
    name: str, checks: Sequence[tuple[str, bool]], cells: Sequence[Mapping[str, Any]], table: str, folder: Path
) -> None:
    """`save` under a line on the GPU and on how many checks were right."""
    good = sum(right for _, right in checks)
    text = f"{machine().get('gpu')}. {good} checks of {len(checks)} passed.\n\n{table}"
    save(name, {"machine": machine(), "checks": checks, "cells": cells}, text, folder)
