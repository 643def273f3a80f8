"""An adapter merged into the weights that it was trained on, packed or not."""

from __future__ import annotations

from whit.merging.measure import Measured, Text, measure_routes
from whit.merging.routes import ROUTES, Merge, merge, prepare_merge

__all__ = ["ROUTES", "Measured", "Merge", "Text", "measure_routes", "merge", "prepare_merge"]
