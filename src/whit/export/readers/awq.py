"""AWQ, versions gemm and gemv."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.checkpoint.reader import Checkpoint
from whit.errors import CheckpointError
from whit.export.readers.base import Packed, group_size_of, modules_with, shape_of
from whit.export.readers.gptq import FLOATS
from whit.formats.affine import Affine
from whit.layouts.affine import signed
from whit.layouts.awq import AWQLayout
from whit.layouts.words import unpack_words
from whit.tensor import PackedWeight, QuantizedTensor

ALL_EIGHTS = -0x77777778  # eight nibbles of 8 as an int32


def read_awq(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every linear with a `qweight`."""
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", 4))
    if version not in ("gemm", "gemv") or bits != 4:
        raise CheckpointError(
            f"{checkpoint.folder}: AWQ {version} of {bits} bits; whit reads gemm and gemv of 4; convert it to gemm"
        )
    claimed = int(config.get("group_size", config.get("q_group_size", 128)))
    reader = partial(_gemm if version == "gemm" else _gemv, claimed)
    return {f"{module}.weight": reader(checkpoint, module) for module in modules_with(checkpoint, "qweight")}


def _gemm(claimed: int, checkpoint: Checkpoint, module: str) -> Packed:
    columns, words = shape_of(checkpoint, f"{module}.qweight", 2, (torch.int32,))
    groups, rows = shape_of(checkpoint, f"{module}.scales", 2, FLOATS)
    zeros = shape_of(checkpoint, f"{module}.qzeros", 2, (torch.int32,))
    if rows != 8 * words or zeros != (groups, words):
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: qweight {[columns, words]}, qzeros {list(zeros)} for {groups} groups of "
            f"{rows} rows; a gemm linear has 8 rows a word; set the right version or get the file again"
        )
    symmetric = bool((checkpoint[f"{module}.qzeros"] == ALL_EIGHTS).all())
    format = _format(checkpoint, module, group_size_of(columns, groups, module, claimed), symmetric)

    def read() -> QuantizedTensor:
        tensors = {key: checkpoint[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales")}
        tensors["scales"] = _scales(tensors["scales"], format)
        return AWQLayout().unpack(PackedWeight("awq", format, (rows, columns), tensors))

    return Packed(_keys(module), (rows, columns), format, read)


def _gemv(group_size: int, checkpoint: Checkpoint, module: str) -> Packed:
    """Rows first, nibbles in their natural order, groups padded to whole words and more."""
    rows, words = shape_of(checkpoint, f"{module}.qweight", 2, (torch.int32,))
    columns = 8 * words
    size = columns if group_size < 1 else group_size
    groups = columns // size
    scales = shape_of(checkpoint, f"{module}.scales", 2, FLOATS)
    zeros = shape_of(checkpoint, f"{module}.qzeros", 2, (torch.int32,))
    if columns % size or scales[0] != rows or scales[1] < groups or zeros != (rows, scales[1] // 8):
        raise CheckpointError(
            f"{checkpoint.folder}: {module}: qweight {[rows, words]}, qzeros {list(zeros)}, scales {list(scales)}; "
            f"an AWQ gemv linear in groups of {size} has {groups} and padding; get the file again"
        )
    format = _format(checkpoint, module, 0 if groups == 1 and group_size != columns else size, symmetric=False)

    def read() -> QuantizedTensor:
        codes = unpack_words(checkpoint[f"{module}.qweight"], columns, 4)
        zero = unpack_words(checkpoint[f"{module}.qzeros"], groups, 4)
        scale = _scales(checkpoint[f"{module}.scales"][:, :groups].contiguous(), format)
        return signed(format, (rows, columns), codes, scale, zero)

    return Packed(_keys(module), (rows, columns), format, read)


def _keys(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{key}" for key in ("qweight", "qzeros", "scales"))


def _format(checkpoint: Checkpoint, module: str, group_size: int, symmetric: bool) -> Affine:
    half = checkpoint.entries[f"{module}.scales"].spec.dtype == torch.float16
    return Affine(4, group_size, symmetric, scale_type="f16" if half else "f32")


def _scales(scales: Tensor, format: Affine) -> Tensor:
    return scales if format.scale_type == "f16" else scales.float()
