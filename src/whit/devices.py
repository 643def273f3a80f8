"""Where to compute: a device as a user names it, and as torch does."""

from __future__ import annotations

import re

import torch

from whit.errors import DeviceError

NAMES = ("auto", "cpu", "cuda")


def find_device(name: str) -> torch.device:
    """The device behind auto, cpu, cuda or cuda:N; auto is a GPU where there is one.

    Raises DeviceError for any other name, and for a GPU that this machine lacks.
    """
    if name not in NAMES and not re.fullmatch(r"cuda:\d+", name):
        raise DeviceError(f"device {name}: unknown; it must be {', '.join(NAMES)} or cuda:N; name one of them")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"device {name}: torch finds {count} GPUs here; it must be one of them; use --device cpu")
    return device
