"""Round to nearest: fit the params to each group's range, take the nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from whit.methods.rows import solve_by_rows
from whit.tensor import Format, LayerStats, Params, QuantizedTensor


@dataclass(frozen=True)
class RTN:
    """Round to nearest; needs no data."""

    name: ClassVar[str] = "rtn"
    needs_stats: ClassVar[bool] = False
    needs_exact: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        return solve_by_rows(_round, weight, format)


def _round(weight: Tensor, format: Format) -> tuple[Tensor, Params]:
    params = format.fit(weight)
    return format.encode(weight, params), params
