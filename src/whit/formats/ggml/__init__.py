"""ggml's types as formats."""

from __future__ import annotations

from whit.formats.ggml.format import Ggml
from whit.formats.ggml.kinds import KINDS, Kind

__all__ = ["KINDS", "Ggml", "Kind"]
