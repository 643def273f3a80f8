"""Run a function in a child process that may be killed; far quicker than a new interpreter."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

STEPS = ("pwrite", "write", "fsync", "fdatasync", "replace", "rename", "unlink", "posix_fallocate", "ftruncate")


def in_child(function: Callable[[], object], kill_after: float | None = None) -> int:
    """The child's exit status, or minus the signal that ended it; `kill_after` seconds it gets SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads did not survive the fork, and it would wait for them
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_step(step: int) -> None:
    """Make this process kill itself before its `step`-th call that changes a file."""
    count = 0

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))
