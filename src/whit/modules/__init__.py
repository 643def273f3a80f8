"""The torch modules that hold packed weights."""

from __future__ import annotations

from whit.modules.alone import check_rows_apart, set_deterministic
from whit.modules.counted import make_countable
from whit.modules.embedding import QuantizedEmbedding, TiedEmbedding
from whit.modules.experts import QuantizedExperts
from whit.modules.linear import QuantizedLinear
from whit.modules.online import track_ranges
from whit.modules.packed import PackedModule, is_offloaded, prepare
from whit.modules.swap import Dtypes, announce, empty_packed, install, install_tied, remove_packed, withdraw
from whit.modules.tied import TiedHead

__all__ = [
    "Dtypes",
    "PackedModule",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "TiedEmbedding",
    "TiedHead",
    "announce",
    "check_rows_apart",
    "empty_packed",
    "install",
    "install_tied",
    "is_offloaded",
    "make_countable",
    "prepare",
    "remove_packed",
    "set_deterministic",
    "track_ranges",
    "withdraw",
]
