"""What the layouts of affine integers share: unsigned codes and zero points, as all of them store them.

Symmetric codes of whit are signed; stored is code + 2^(bits-1), whose zero point is 2^(bits-1) everywhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whit.errors import CheckpointError
from whit.formats.act_order import ActOrder
from whit.formats.affine import Affine
from whit.tensor import Format, QuantizedTensor, matrix_shape, tensor_param


def as_affine(format: Format) -> Affine | None:
    """The format as affine integers with one scale and an integer zero point per group or row; else None."""
    fits = isinstance(format, Affine) and not format.per_tensor and not format.float_zero
    return format if fits and isinstance(format, Affine) else None


def integers_of(format: Format) -> Affine | None:
    """As `as_affine`, and the integers of an act-order format, whose groups are not neighbours."""
    return format.integers if isinstance(format, ActOrder) else as_affine(format)


def refuse_affine(format: Format, bits: tuple[int, ...], scale_types: tuple[str, ...]) -> str | None:
    """Why a format is not affine integers of these widths with scales of these types; None where it is."""
    if isinstance(format, ActOrder):
        return f"holds groups of neighbouring columns, which those of {format} are not; gptq and gptq-v2 hold it"
    affine = as_affine(format)
    if affine is None or affine.bits not in bits:
        widths = ", ".join(map(str, bits))
        return f"holds affine integers of {widths} bits, per group or channel, with integer zero points"
    if affine.scale_type not in scale_types:
        names = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
        kinds = " or ".join(names[kind] for kind in scale_types)
        best = with_scales(affine, scale_types[0])
        return f"stores {kinds} scales, and those of {format} are {names[affine.scale_type]}; use {best}"
    return None


def refuse_ragged(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a matrix whose last group is shorter than the others does not fit; None where all are whole."""
    size, columns = getattr(integers_of(format), "group_size", 0), shape[-1]
    return (
        f"holds whole groups, and {columns} columns are not a multiple of {size}" if size and columns % size else None
    )


def with_scales(format: Affine, scale_type: str) -> Affine:
    """The same affine format with scales of another type."""
    return replace(format, scale_type=scale_type)


def half_scales(format: Format) -> Format:
    """The same integers with float16 scales; other formats as they are."""
    if isinstance(format, ActOrder):
        return ActOrder(with_scales(format.integers, "f16"))
    affine = as_affine(format)
    return format if affine is None else with_scales(affine, "f16")


def unsigned(quantized: QuantizedTensor) -> tuple[Affine, Tensor, Tensor, Tensor]:
    """The integers, codes uint8 (rows, columns), scale and zero point uint8 (rows, groups)."""
    format = integers_of(quantized.format)
    assert format is not None
    rows, columns = matrix_shape(quantized.shape)
    codes = (quantized.codes.reshape(rows, columns).to(torch.int16) - format.code_min).to(torch.uint8)
    scale = tensor_param(quantized.params, "scale")
    if format.symmetric:
        return format, codes, scale, torch.full(scale.shape, middle(format.bits), dtype=torch.uint8)
    return format, codes, scale, tensor_param(quantized.params, "zero_point").to(torch.uint8)


def signed(
    format: Format, shape: tuple[int, ...], codes: Tensor, scale: Tensor, zero: Tensor | None,
    group: Tensor | None = None,
) -> QuantizedTensor:  # fmt: skip
    """The inverse of `unsigned`; a symmetric format needs zero points that are all in the middle.

    An act-order format needs the `group` (columns,) of each column.
    """
    if isinstance(format, ActOrder):
        assert group is not None
        value = signed(format.integers, shape, codes, scale, zero)
        params = {**value.params, "group": group.to(torch.int16).reshape(1, -1)}
        return QuantizedTensor(format, shape, value.codes, params)
    assert isinstance(format, Affine)
    if not format.symmetric:
        assert zero is not None
        return QuantizedTensor(format, shape, codes, {"scale": scale, "zero_point": zero.to(torch.uint8)})
    if zero is not None and not bool((zero == middle(format.bits)).all()):
        raise CheckpointError(
            f"{format}: zero points other than {middle(format.bits)}; a symmetric format has none; read it as -asym"
        )
    shifted = (codes.to(torch.int16) + format.code_min).to(format.code_dtype)
    return QuantizedTensor(format, shape, shifted, {"scale": scale})


def middle(bits: int) -> int:
    """The zero point of unsigned codes that stand for symmetric ones."""
    return 1 << (bits - 1)
