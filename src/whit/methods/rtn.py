"""Round to nearest: fit the params to each group's range, take the nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from whit.tensor import Format, LayerStats, QuantizedTensor


@dataclass(frozen=True)
class RTN:
    """Round to nearest; needs no data."""

    name: ClassVar[str] = "rtn"
    needs_stats: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        params = format.fit(weight)
        codes = format.encode(weight, params)
        return QuantizedTensor(format, tuple(weight.shape), codes, format.seal(params))
