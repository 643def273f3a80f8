"""Which format each group of matrices gets, so that the whole file has a given size and loses the least."""

from whit.allocation.budget import Choice, allocate
from whit.allocation.recipe import Budgeted, budgeted
from whit.allocation.sensitivity import LADDER, Group, measure_sensitivity

__all__ = ["LADDER", "Budgeted", "Choice", "Group", "allocate", "budgeted", "measure_sensitivity"]
