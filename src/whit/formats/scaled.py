"""What formats share whose params are one per group of columns, per row, or for the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.formats.grouping import ROW, group_count, scale_sums
from whit.formats.numeric import DTYPE_NAMES
from whit.tensor import Params, ParamSpec, tensor_param


class Scaled:
    """Adds no field: a subclass says `group_size` (0: the whole row), `per_tensor` and `scale_type` ("": the usual)."""

    group_size: int
    per_tensor: bool
    scale_type: str

    def __post_init__(self) -> None:
        if not self.scale_type:
            object.__setattr__(self, "scale_type", self.default_scale_type)

    @property
    def default_scale_type(self) -> str:
        """bfloat16 for groups, where scales cost memory; float32 where there is one per row or fewer."""
        return "bf16" if self.group_size else "f32"

    @property
    def where(self) -> str:
        """What has a scale of its own, as the shorthand says it: `tensor`, `channel` or `g128`."""
        return "tensor" if self.per_tensor else f"g{self.group_size}" if self.group_size else "channel"

    @property
    def row_independent(self) -> bool:
        return not self.per_tensor

    def row_scale(self, params: Params) -> Tensor:
        """float32 (rows, 1), or (1, 1); for formats without groups."""
        return tensor_param(params, "scale").to(torch.float32)

    def sums(self, values: Tensor) -> Tensor:
        return scale_sums(values, self.group_size, self.per_tensor)

    def params_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, groups) of every param of a (rows, columns) matrix; (1, 1) where one serves the whole."""
        return (1, 1) if self.per_tensor else (rows, group_count(columns, self.group_size))

    def scale_spec(self, rows: int, columns: int) -> ParamSpec:
        """How the scales of a (rows, columns) matrix are stored."""
        dtype = DTYPE_NAMES[self.scale_type]
        return ParamSpec(self.params_shape(rows, columns), dtype, 8 * dtype.itemsize)

    def seal(self, params: Params) -> Params:
        return params


def group_size_in(where: str | None) -> int:
    """The inverse of `where`: columns that share params, 0 for the whole row and for the tensor."""
    return int(where[1:]) if where and where.startswith("g") else ROW
