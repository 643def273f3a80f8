"""NVIDIA ModelOpt's files: `weight` in E4M3 with one scale (FP8), in NVFP4, or in MXFP8.

NVFP4: `weight` uint8 (N, K / 2), `weight_scale` E4M3 (N, K / 16), `weight_scale_2` float32. A linear's
`pre_quant_scale` (K,) multiplies its inputs, so that W has it for its columns. `input_scale` and `k_scale`, `v_scale`
say how inputs and the cache are rounded by those who serve such files, which is not part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, modules_with, shape_of
from whit.export.readers.compressed_tensors import one_byte
from whit.export.readers.microscaled import mxfp8_linear, nvfp4_linear


def read_modelopt(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `weight_scale`."""
    modules = [m for m in modules_with(checkpoint, "weight_scale") if f"{m}.weight" in checkpoint]
    return {f"{module}.weight": _linear(checkpoint, module) for module in modules}


def _linear(checkpoint: Checkpoint, module: str) -> Packed:
    weight, scale, whole, inputs, before = (
        f"{module}.{key}" for key in ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
    )
    others = tuple(key for key in (inputs, before) if key in checkpoint)
    kinds = (checkpoint.entries[weight].spec.dtype, checkpoint.entries[scale].spec.dtype)
    if kinds == (torch.uint8, torch.float8_e4m3fn):
        found = nvfp4_linear(checkpoint, (weight, scale, whole), divides=False, others=others)
    elif kinds == (torch.float8_e4m3fn, torch.uint8):
        found = mxfp8_linear(checkpoint, weight, scale, others)
    elif kinds[0] == torch.float8_e4m3fn and len(checkpoint.entries[scale].spec.shape) <= 2:
        found = one_byte(checkpoint, module)
        found = replace(found, keys=(*found.keys, *(key for key in others if key not in found.keys)))
    else:
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: ModelOpt's weights as {kinds[0]} with scales as {kinds[1]}; whit reads "
            "its FP8, NVFP4 and MXFP8; use the original model"
        )
    if before not in checkpoint:
        return found
    if shape_of(checkpoint, before, 1, (torch.float32, torch.bfloat16, torch.float16)) != found.shape[1:]:
        raise CheckpointError(f"{checkpoint.folder}: {before} has not one number for each of {found.shape[1]} inputs")
    load: Callable[[], Tensor] = lambda: found.floats() * checkpoint[before].float()  # noqa: E731
    return replace(found, format=None, load=load, note="a scale for each input, which no format of whit has")
