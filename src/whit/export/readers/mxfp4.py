"""MXFP4, in which gpt-oss is published (OCP Microscaling Formats 1.0): 4-bit floats, 32 columns to a power of two.

Of a stack of experts `..._blocks` uint8 (experts, out, in / 32, 16) and `..._scales` uint8 (experts, out, in / 32):
column 2 j of a group is the low half of byte j, 2 j + 1 the high one; a half is E2M1, a scale E8M0, and
w = e2m1(half) 2^(scale - 127). That is ggml's `mxfp4` in another order, so that whit has it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, shape_of
from whit.export.readers.microscaled import MXFP4, finite, two_codes
from whit.tensor import QuantizedTensor

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a group


def read_mxfp4(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every stack with `_blocks` and `_scales`."""
    names = [key.removesuffix(BLOCKS) for key in checkpoint if key.endswith(BLOCKS)]
    return {name: _stack(checkpoint, name) for name in names}


def _stack(checkpoint: Checkpoint, name: str) -> Packed:
    keys = (name + BLOCKS, name + SCALES)
    experts, rows, groups, size = shape_of(checkpoint, keys[0], 4, (torch.uint8,))
    scales = shape_of(checkpoint, keys[1], 3, (torch.uint8,))
    if scales != (experts, rows, groups) or size != BYTES:
        raise CheckpointError(
            f"{checkpoint.folder}: {name}: blocks {[experts, rows, groups, size]} with scales {list(scales)}; there "
            f"must be one scale for {BYTES} bytes; get the file again"
        )
    shape = (experts, rows, 2 * BYTES * groups)
    return Packed(keys, shape, MXFP4, partial(_read, checkpoint, keys, shape))


def _read(checkpoint: Checkpoint, keys: tuple[str, str], shape: tuple[int, int, int]) -> QuantizedTensor:
    codes = two_codes(checkpoint[keys[0]]).reshape(-1, shape[-1])
    scales = finite(checkpoint[keys[1]], keys[1])
    return QuantizedTensor(MXFP4, shape, codes, {"exponent": scales.reshape(len(codes), -1)})
