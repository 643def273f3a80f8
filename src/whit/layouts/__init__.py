"""How the bytes lie. A new layout is one file and one name in LAYOUTS."""

from __future__ import annotations

from whit.errors import FormatError
from whit.layouts.awq import AWQLayout
from whit.layouts.base import Layout
from whit.layouts.bits import Bits, WholeBits
from whit.layouts.bitsandbytes import Bnb4Bit, Bnb8Bit
from whit.layouts.compressed_tensors import FloatQuantized, IntQuantized, PackQuantized
from whit.layouts.ggml import GgmlBlocks
from whit.layouts.gptq import GPTQLayout
from whit.layouts.hqq import HQQLayout
from whit.layouts.matmul_nbits import MatMulNBits
from whit.layouts.mlx import MLXLayout

BITS, WHOLE_BITS = Bits(), WholeBits()
GGML = GgmlBlocks()
LAYOUTS: tuple[Layout, ...] = (
    BITS, GGML, GPTQLayout(1), GPTQLayout(2), AWQLayout(), Bnb4Bit(), Bnb8Bit(), PackQuantized(), IntQuantized(),
    FloatQuantized(), MLXLayout(), HQQLayout(), MatMulNBits(),
)  # fmt: skip
HELD = (*LAYOUTS, WHOLE_BITS)  # what a module may hold


def layout_named(name: str) -> Layout:
    """The layout of that name."""
    for layout in HELD:
        if layout.name == name:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise FormatError(f"layout {name!r} is not known; it must be one of {known}; update whit to read this file")


__all__ = ["BITS", "GGML", "HELD", "LAYOUTS", "WHOLE_BITS", "Bits", "GgmlBlocks", "Layout", "layout_named"]
