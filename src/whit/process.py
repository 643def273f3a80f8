"""What this process holds in memory, and others like it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")  # Linux: getrusage's figure begins with what the process had that started this one


def process_memory(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at most (`VmHWM`); 0 where the system does not say it so."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def peak_memory() -> int:
    """Most bytes that this process has held in memory."""
    if known := process_memory("VmHWM"):
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def give_back_freed() -> None:
    """Give memory that was freed, and that glibc keeps for the next one who asks, back to the system; elsewhere
    nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def command_of(module: str, *words: str) -> list[str]:
    """What starts a module of whit in a process of its own, which imports what this one does.

    `python -m` would look into the current folder first, where a user may have a torch.py or an evaluate.py.
    """
    start = f"import runpy, sys; sys.path[:] = {sys.path!r}; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", start, *words]
