"""Weights from one of a module's two layouts to the other: codes as digits, and in whole bits."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TypeGuard

import torch

from whit.errors import FormatError
from whit.formats import Affine
from whit.formats.signs import Ternary
from whit.layouts import BITS, WHOLE_BITS, Bits
from whit.tensor import Format, PackedWeight, matrix_shape

AT_ONCE = 1 << 25  # codes that are unpacked at a time, a few bytes each


def as_whole(packed: PackedWeight) -> PackedWeight:
    """A weight of layout `bits`, whose codes are digits, in `whole-bits`."""
    return _turned(packed, BITS, WHOLE_BITS)


def as_stored(packed: PackedWeight) -> PackedWeight:
    """The weight as a file has it: the inverse of `as_whole`, byte for byte; one of another layout as it is."""
    return _turned(packed, WHOLE_BITS, BITS) if packed.layout == WHOLE_BITS.name else packed


def _turned(packed: PackedWeight, before: Bits, after: Bits) -> PackedWeight:
    columns = matrix_shape(packed.shape)[1]
    parts = torch.split(packed.tensors["codes"], max(AT_ONCE // max(columns, 1), 1))
    turned = [after.pack_codes(before.unpack_codes(part, columns, packed.format), packed.format) for part in parts]
    return replace(packed, layout=after.name, tensors={**packed.tensors, "codes": torch.cat(turned)})


def integers(packed: PackedWeight) -> PackedWeight:
    """A ternary weight of layout `whole-bits` as the integers of 2 bits that it is, over the same codes."""
    outs = matrix_shape(packed.shape)[0]
    scale = packed.tensors["scale"]
    each = scale.expand(outs, 1).contiguous() if scale.shape[0] < outs else scale
    tensors = {"codes": packed.tensors["codes"], "scale": each}
    return replace(packed, layout=BITS.name, format=integers_of(packed.format), tensors=tensors)


@lru_cache(maxsize=64)
def integers_of(format: Format) -> Format:
    """The format of the integers that ternary codes are; FormatError for another one."""
    if not is_ternary(format):
        raise FormatError(
            f"{format}: codes are not digits of base 3; only those of ternary formats are integers of 2 bits"
        )
    return Affine(format.bits, format.group_size, scale_type=format.scale_type)


def is_ternary(format: Format) -> TypeGuard[Ternary]:
    """Whether it is a ternary format, with nothing around it."""
    return isinstance(format, Ternary)
