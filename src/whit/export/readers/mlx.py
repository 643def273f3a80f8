"""MLX, mode affine: the width by the number of words and the configured group size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import SCALE_TYPES, Packed, modules_with, shape_of
from whit.export.readers.gptq import FLOATS
from whit.formats.affine import Affine
from whit.formats.offset import Offset
from whit.layouts.affine import middle
from whit.layouts.mlx import BITS, MLXLayout
from whit.tensor import Format, PackedWeight, QuantizedTensor


def read_mlx(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every module with `scales` or `biases`."""
    modules = dict.fromkeys([*modules_with(checkpoint, "scales"), *modules_with(checkpoint, "biases")])
    return {f"{module}.weight": _module(config, checkpoint, module) for module in modules}


def _module(config: Mapping[str, Any], checkpoint: Checkpoint, module: str) -> Packed:
    where = f"{checkpoint.folder}: {module}"
    options = config.get(module) if isinstance(config.get(module), dict) else config
    assert options is not None
    mode, size = options.get("mode", "affine"), options.get("group_size")
    if mode != "affine" or not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{where}: MLX mode {mode}, group_size {size}; whit reads mode affine; convert it there")
    rows, words = shape_of(checkpoint, f"{module}.weight", 2, (torch.uint32,))
    params = shape_of(checkpoint, f"{module}.scales", 2, FLOATS)
    columns = params[1] * size
    bits = 32 * words // max(columns, 1)
    same = shape_of(checkpoint, f"{module}.biases", 2, FLOATS) == params
    if bits not in BITS or bits * columns != 32 * words or params[0] != rows or not same:
        raise CheckpointError(
            f"{where}: weight {[rows, words]} and scales {list(params)} in groups of {size} fit no width; "
            "they must; correct config.json or get the file again"
        )
    scale, offset = checkpoint[f"{module}.scales"], checkpoint[f"{module}.biases"]
    kind = SCALE_TYPES[scale.dtype]
    symmetric = torch.equal(offset, -scale * middle(bits))
    format: Format = Affine(bits, size, scale_type=kind) if symmetric else Offset(bits, size, kind)
    keys = tuple(f"{module}.{key}" for key in ("weight", "scales", "biases"))
    return Packed(keys, (rows, columns), format, partial(_read, checkpoint, module, format, (rows, columns)))


def _read(checkpoint: Checkpoint, module: str, format: Format, shape: tuple[int, int]) -> QuantizedTensor:
    tensors = {key: checkpoint[f"{module}.{key}"] for key in ("weight", "scales", "biases")}
    return MLXLayout().unpack(PackedWeight("mlx", format, shape, tensors))
