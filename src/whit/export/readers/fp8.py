"""Fine-grained FP8, in which DeepSeek V3, Qwen 3 and others are published: bytes of e4m3, a scale for each tile.

`weight` float8 (out, in); `weight_scale_inv` (out / m, in / n), rounded up: W = weight * scale, tiles of (m, n) as
`weight_block_size` says, 128 x 128 mostly. No format of whit has such tiles, so that the weights are read as floats.
Inputs are rounded to FP8 as they come by those who serve such files, which is not part of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, modules_with, shape_of

TILE = (128, 128)
SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
NOTE = "tiles of FP8, which no format of whit has"


def read_fp8(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `weight_scale_inv`."""
    stacked = next((name for name in checkpoint if name.endswith("_scale_inv") and not _is_linears(name)), None)
    if stacked is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: {stacked}: a stack of experts in FP8; each must be a linear of its own, as the hub "
            "has them; use that checkpoint"
        )
    tile = tuple(int(n) for n in config.get("weight_block_size") or TILE)
    if len(tile) != 2 or min(tile) < 1:
        raise CheckpointError(f"{checkpoint.folder}: weight_block_size {list(tile)}; it must be two sizes; correct it")
    modules = modules_with(checkpoint, "weight_scale_inv")
    return {f"{module}.weight": _linear(checkpoint, module, (tile[0], tile[1])) for module in modules}


def _is_linears(name: str) -> bool:
    return name.endswith(".weight_scale_inv")


def _linear(checkpoint: Checkpoint, module: str, tile: tuple[int, int]) -> Packed:
    keys = (f"{module}.weight", f"{module}.weight_scale_inv")
    rows, columns = shape_of(checkpoint, keys[0], 2, (torch.float8_e4m3fn,))
    entry = checkpoint.entries[keys[1]].spec
    whole = entry.shape in ((), (1,))  # one scale for the matrix
    scales = (1, 1) if whole else shape_of(checkpoint, keys[1], 2, SCALES)
    if not whole and scales != (-(-rows // tile[0]), -(-columns // tile[1])):
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: scales {list(scales)} for {[rows, columns]} in tiles of {list(tile)}; "
            "there must be one for each; correct weight_block_size, or get the file again"
        )
    step = (rows, columns) if whole else tile
    return Packed(keys, (rows, columns), None, partial(_floats, checkpoint, keys, step), NOTE)


def _floats(checkpoint: Checkpoint, keys: tuple[str, str], tile: tuple[int, int]) -> Tensor:
    weight, scale = checkpoint[keys[0]].to(torch.float32), checkpoint[keys[1]].to(torch.float32)
    scale = scale.reshape(1, 1) if scale.dim() < 2 else scale
    for number, rows in enumerate(torch.split(weight, tile[0])):  # no second matrix of scales, as large as the weight
        rows *= scale[number].repeat_interleave(tile[1])[: weight.shape[1]]
    return weight
