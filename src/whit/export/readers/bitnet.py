"""BitNet b1.58 as transformers packs it (Ma et al. 2024): ternary weights, four to a byte, one scale per matrix.

`weight` uint8 (out / 4, in): bits [2 i, 2 i + 2) of row r hold code + 1 of row r + i out / 4. `weight_scale` (1,):
`bitlinear` divides by it, w = code / weight_scale; `autobitlinear` multiplies, w = code weight_scale. Both also round
activations to 8 bits per token, which is not part of the weights.
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
from whit.formats.signs import Ternary
from whit.tensor import QuantizedTensor

PER_BYTE = 4
FORMAT = Ternary()
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def read_bitnet(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `weight_scale`."""
    mode, kind = config.get("quantization_mode", "offline"), config.get("linear_class", "bitlinear")
    if config.get("use_rms_norm"):
        raise CheckpointError(
            f"{checkpoint.folder}: BitNet with norms inside its linears, which no model of transformers has otherwise; "
            "they must be modules of their own; use a checkpoint that has them so"
        )
    if mode != "offline":
        raise CheckpointError(
            f"{checkpoint.folder}: BitNet in mode {str(mode)[:40]}, floats that are rounded as they run; whit reads "
            "packed weights; use the packed checkpoint, or take quantization_config out of config.json and "
            "quantize with --method rtn --format ternary-tensor-absmean"
        )
    return {
        f"{m}.weight": _linear(checkpoint, m, kind == "bitlinear") for m in modules_with(checkpoint, "weight_scale")
    }


def _linear(checkpoint: Checkpoint, module: str, divides: bool) -> Packed:
    rows, columns = shape_of(checkpoint, f"{module}.weight", 2, (torch.uint8,))
    if shape_of(checkpoint, f"{module}.weight_scale", 1, FLOATS) != (1,):
        raise CheckpointError(f"{checkpoint.folder}: {module}.weight_scale is not one number; get the file again")
    shape = (PER_BYTE * rows, columns)
    keys = (f"{module}.weight", f"{module}.weight_scale")
    return Packed(keys, shape, FORMAT, partial(_read, checkpoint, module, shape, divides))


def _read(checkpoint: Checkpoint, module: str, shape: tuple[int, int], divides: bool) -> QuantizedTensor:
    digits = unpack_quarters(checkpoint[f"{module}.weight"])
    if bool((digits == 3).any()):
        raise CheckpointError(f"{module}.weight: holds the code 3; ternary ones end at 2; get the file again")
    scale = checkpoint[f"{module}.weight_scale"].to(torch.float32)
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise CheckpointError(f"{module}.weight_scale: {float(scale[0])}; it must be positive; get the file again")
    step = 1 / scale if divides else scale
    codes = digits.to(torch.int8) - 1
    return QuantizedTensor(FORMAT, shape, codes, {"scale": step.reshape(1, 1).repeat(shape[0], 1)})


def unpack_quarters(packed: Tensor) -> Tensor:
    """uint8 (rows / 4, columns) to the digits 0 to 3 that its bytes hold, uint8 (rows, columns)."""
    return torch.cat([(packed >> 2 * place) & 3 for place in range(PER_BYTE)])
