"""GGUF files, as llama.cpp reads them."""

from __future__ import annotations

from whit.export.gguf.exporter import Gguf

__all__ = ["Gguf"]
