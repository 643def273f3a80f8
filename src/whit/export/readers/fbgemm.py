"""FBGEMM's FP8 (`quant_method: fbgemm_fp8`): E4M3 with a scale per row, and Llama 4's experts so.

Linears: `weight` (out, in), `weight_scale` (out, 1). Experts lie the other way about: `gate_up_proj` (experts, in, out)
with `gate_up_proj_scale` (experts, 1, out), `down_proj` with (experts, out, 1). Inputs are rounded to FP8 per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.activations import Activations
from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed, modules_with, shape_of
from whit.export.readers.compressed_tensors import one_byte

EXPERTS = ("gate_up_proj", "down_proj")
NOTE = "experts that lie the other way about, with a scale for each column"


def read_fbgemm(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `weight_scale`, and stacks of experts with theirs."""
    packed = {f"{module}.weight": _linear(checkpoint, module) for module in modules_with(checkpoint, "weight_scale")}
    for name in EXPERTS:
        for holder in modules_with(checkpoint, f"{name}_scale"):
            packed[f"{holder}.{name}"] = _experts(checkpoint, f"{holder}.{name}")
    return packed


def _linear(checkpoint: Checkpoint, module: str) -> Packed:
    rows, _ = shape_of(checkpoint, f"{module}.weight", 2, (torch.float8_e4m3fn,))
    scale = checkpoint.entries[f"{module}.weight_scale"].spec
    if scale.dtype not in SCALE_TYPES or scale.shape not in ((rows, 1), (rows,)):
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: scales {list(scale.shape)} for {rows} rows; there must be one for each; "
            "get the file again"
        )
    found = one_byte(checkpoint, module)
    bound = f"{module}.input_scale_ub"  # of older versions; the same for all of a file
    keys = (*found.keys, bound) if bound in checkpoint else found.keys
    return replace(found, keys=keys, inputs=lambda: Activations(type="fp8"))


def _experts(checkpoint: Checkpoint, name: str) -> Packed:
    keys = (name, f"{name}_scale")
    experts, before, after = shape_of(checkpoint, name, 3, (torch.float8_e4m3fn,))
    if shape_of(checkpoint, keys[1], 3, tuple(SCALE_TYPES)) not in ((experts, 1, after), (experts, after, 1)):
        raise CheckpointError(
            f"{checkpoint.folder}: {keys[1]} must have one number for each of {experts} x {after} columns; get the "
            "file again"
        )
    return Packed(keys, (experts, before, after), None, partial(_floats, checkpoint, keys), NOTE)


def _floats(checkpoint: Checkpoint, keys: tuple[str, str]) -> Tensor:
    weight, scale = checkpoint[keys[0]].float(), checkpoint[keys[1]].float()
    return weight * scale.reshape(len(weight), 1, -1)
