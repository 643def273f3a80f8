"""EETQ's int8 (NetEase): a scale per row, and codes in the order in which NVIDIA's GPUs from Turing on multiply them.

`weight` int8 (in, out) in name alone; `weight_scales` float16 (out,): w = code scale. In its bytes each pair of rows of
the matrix (out, in) takes turns in runs of 64 columns; the 16 columns of a part of a run lie as 0 1 8 9, 2 3 10 11, 4 5
12 13, 6 7 14 15 with the middle two of each four changed over; a byte is code + 128. (Volta's order, of which files say
nothing either, is another.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed, modules_with, shape_of
from whit.export.readers.blocks import Blocks, affine_blocks

RUN = 64  # columns


def read_eetq(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with `weight_scales`."""
    return {f"{module}.weight": _linear(checkpoint, module) for module in modules_with(checkpoint, "weight_scales")}


def _linear(checkpoint: Checkpoint, module: str) -> Packed:
    keys, where = (f"{module}.weight", f"{module}.weight_scales"), f"{checkpoint.folder}: {module}"
    columns, rows = shape_of(checkpoint, keys[0], 2, (torch.int8,))
    if shape_of(checkpoint, keys[1], 1, tuple(SCALE_TYPES)) != (rows,) or columns % RUN or rows % 2:
        raise CheckpointError(
            f"{where}: weight {[columns, rows]} with scales {list(checkpoint.entries[keys[1]].spec.shape)}; EETQ has a "
            f"scale for each of an even number of rows of {RUN} columns and more; get the file again"
        )
    said = Blocks(where, keys, (rows, columns), (1, columns), 8, -128)
    return affine_blocks(said, checkpoint[keys[1]], None, partial(_codes, checkpoint, keys[0], (rows, columns)))


def _codes(checkpoint: Checkpoint, key: str, shape: tuple[int, int]) -> Tensor:
    return (in_order(checkpoint[key].view(torch.uint8), shape) ^ 128).view(torch.int8)


def in_order(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bytes as the file has them to (rows, columns)."""
    rows, columns = shape
    # a column's place in its run: 16 (part) + 8 (half) + 2 (pair) + (odd), in the file part, pair, odd, half
    parts = stored.reshape(rows // 2, columns // RUN, 2, RUN // 16, 4, 2, 2)
    return parts.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns)
