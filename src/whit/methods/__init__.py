"""Which codes are chosen. A new method is one file and one name in METHODS."""

from __future__ import annotations

from whit.methods.base import Method
from whit.methods.rtn import RTN

METHODS = (RTN,)

__all__ = ["METHODS", "RTN", "Method"]
