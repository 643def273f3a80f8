"""Random numbers of whit's own: torch is seeded for a while, and the caller finds its generators as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from whit.errors import RecipeError
from whit.named import require


def check_seed(seed: int) -> None:
    """RecipeError for a seed that torch's generators do not take: they have 64 bits."""
    require(seed, int, f"seed {seed!r}", "it must be a whole number; give one")
    if not -(1 << 63) <= seed < 1 << 64:
        raise RecipeError(f"seed {seed}: does not fit into 64 bits; a seed must; choose a smaller one")


@contextmanager
def callers_randomness(device: torch.device | None = None) -> Iterator[None]:
    """What is drawn or seeded inside moves none of torch's generators: the CPU's, and of GPUs `device` (None: all)."""
    if device is not None:
        gpus = [device] if device.type == "cuda" else []
    else:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = [torch.device("cuda", number) for number in range(count)]
    with torch.random.fork_rng(devices=gpus):
        yield


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch draws by this seed on the CPU and on `device` (None: everywhere); the caller's state comes back."""
    with callers_randomness(device):
        if device is None:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
        yield
