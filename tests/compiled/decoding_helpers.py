"""What the tests of compiled decoding share: prompts, and both loops side by side."""

from __future__ import annotations

import warnings

import torch

GREEDY = {"max_new_tokens": 30, "do_sample": False}


def prompt(length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def same(model, *args, **kwargs):
    """What both loops generate, compared; no warning may say that the compiled one did not run."""
    expected = model.plain(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate(*args, **kwargs)
    assert torch.equal(getattr(expected, "sequences", expected), getattr(found, "sequences", found))
    return expected, found
