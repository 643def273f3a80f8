"""Which format each group of matrices gets, so that the whole file has a given size and loses the least."""

from whit.allocation.budget import Choice, allocate
from whit.allocation.divergence import measure_divergence
from whit.allocation.outlook import Outlook, foresee
from whit.allocation.recipe import Budgeted, Measure, budgeted, measured, solve
from whit.allocation.sensitivity import Group, measure_sensitivity
from whit.allocation.space import LADDER, LADDERS, free_formats, ladder_of

__all__ = [
    "LADDER", "LADDERS", "Budgeted", "Choice", "Group", "Measure", "Outlook", "allocate", "budgeted", "foresee",
    "free_formats", "ladder_of", "measure_divergence", "measure_sensitivity", "measured", "solve",
]  # fmt: skip
