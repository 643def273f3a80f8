"""What a method is: it chooses codes. Everything a method may know is in its arguments."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from whit.tensor import Format, LayerStats, QuantizedTensor


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of options; the same inputs give the same codes."""

    @property
    def name(self) -> str: ...
    @property
    def needs_stats(self) -> bool: ...

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        """Quantize a finite float matrix (out_features, in_features)."""
        ...
