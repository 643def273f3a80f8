"""What figures of speed depend on: the machine, its libraries, and how fast it can read memory."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from whit.devices import find_device

PEERS = ("bitsandbytes", "hqq", "optimum-quanto", "torchao")  # what `whit compare` and `whit bench` measure beside
LIBRARIES = ("torch", "transformers", *PEERS)
READ = 256 << 20  # bytes, more than any cache holds
READS = 5  # the fastest counts


def machine(device: str) -> dict[str, Any]:
    """Names of processor and GPU, cores, threads, instruction set, versions of what is installed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or None,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "libraries": {name: number for name in LIBRARIES if (number := installed(name))},
    }
    if find_device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def installed(package: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_bandwidth(device: str) -> float:
    """Bytes per second of reading memory once through, the best of several: the ceiling of batch-1 decoding."""
    data = torch.ones(READ // 4, dtype=torch.float32, device=find_device(device))
    best = float("inf")
    for _ in range(READS):
        start = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - start)
    return READ / best
