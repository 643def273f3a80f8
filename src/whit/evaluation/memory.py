"""Whether two models fit in memory beside each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from whit.devices import find_device

_OVERHEAD = 1.3  # weights as loaded, against their bytes on disk
_WORKING_BYTES = 2 * 2**30  # two windows of logits, activations, allocator


def available_bytes(device: str) -> int:
    """Bytes that can be allocated now on the device that "auto", "cpu" or "cuda" stands for."""
    if find_device(device).type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # MemAvailable counts the page cache that the system would give back; sysconf does not
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def fit_together(weight_bytes: Sequence[int], available: int) -> bool:
    """Whether models with these bytes of weight files can be loaded at the same time."""
    return sum(weight_bytes) * _OVERHEAD + _WORKING_BYTES <= available
