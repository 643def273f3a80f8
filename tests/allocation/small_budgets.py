"""What the tests of budgets share: a run whose formats are to be chosen, from which, and by which tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from whit import Options, Recipe
from whit.pipeline.job import Job, prepare

TINY = ("int2-g32-asym", "int4-g32", "int8")
TOKENS = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(0))


def undecided(model: Path | str, out: Path, *rules: tuple[str, str], export: str = "whit") -> Job:
    return prepare(model, out, Recipe(None, [("*", "bf16"), *rules]), Options(), export=export)
