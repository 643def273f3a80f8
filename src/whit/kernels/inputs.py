"""Inputs as they are after a packed linear has rounded them: what a search or a training step computes with."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.kernels import float8, int8
from whit.rotation import rotate
from whit.tensor import Activated


def rounded_inputs(x: Tensor, how: Activated, turn: int = 0) -> Tensor:
    """x (rows, in) as dynamic activations make it, float32; `turn` columns are rotated together before, and back after.

    Static ranges are not known here, nor which columns will hold outliers, for that depends on the batch: in the place
    of both stands a scale per row for all columns.
    """
    wide = x.to(torch.float32)
    if turn:
        return rotate(rounded_inputs(rotate(wide, turn), how), turn)
    if how.granularity == "group":
        return int8.rounded_groups(wide)
    whole = how.kind == "dynamic" and how.granularity == "tensor"
    if how.dtype != torch.int8:
        return decoded(float8.quantize_rows(wide, whole))
    return decoded(int8.quantize_rows(wide, whole, how.symmetric))


def decoded(rows: int8.Rows) -> Tensor:
    """What codes stand for, float32."""
    codes = rows.codes.to(torch.float32)
    return (codes if rows.zero_point is None else codes - rows.zero_point) * rows.scale
