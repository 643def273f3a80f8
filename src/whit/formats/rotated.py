"""A format whose codes are of the rotated matrix: w = decode(codes) H, with H turning every few columns (`rotation`).

`int8+h64` are int8 codes of w H, in runs of 64 columns. A kernel multiplies them by x H, which has no channels that are
much larger than their neighbours (QuaRot, Ashkboos et al. 2024; QuIP, Chee et al. 2023): what is rounded per token, or
per group of weights, is rounded finer. To all others, dequantize() too, the matrix is what it was: in its own basis.
Codes, params and bytes are the base's. Methods see the base alone, and the matrix and statistics rotated
(`methods.rotated`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from whit.capabilities import rotation
from whit.errors import FormatError
from whit.formats.around import Around
from whit.formats.bands import bands_of
from whit.rotation import SIZES, rotate_exactly
from whit.tensor import Format, PackedWeight, Params, ParamSpec

PATTERN = re.compile(r"(?P<base>.+)\+h(?P<size>[1-9]\d{0,4})")


@dataclass(frozen=True)
class Rotated(Around):
    """`base`, with every `rotation` columns turned."""

    base: Format
    rotation: int

    def __post_init__(self) -> None:
        if self.rotation not in SIZES:
            raise FormatError(
                f"{self}: a rotation of {self.rotation} columns; it must be one of {', '.join(map(str, SIZES))}; write "
                f"{self.base}+h64"
            )
        if self.base.bits == 16 or self.base.vector_size > 1 or not _is_plain(self.base):
            raise FormatError(f"{self}: it turns a plain format of up to 8 bits, before any side-car; write int8+h64")
        if self.base.group_size % self.rotation:
            raise FormatError(
                f"{self}: groups of {self.base.group_size} columns; they must be multiples of the rotation; use "
                f"larger groups, or a smaller one of {', '.join(map(str, SIZES))}"
            )

    def __str__(self) -> str:
        return f"{self.base}+h{self.rotation}"

    @property
    def vector_size(self) -> int:
        """Columns are coded jointly."""
        return self.rotation

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        return self.base.param_specs(rows, columns)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        """The base's params of w H; the importance of a run is its mean, for it is spread like the run."""
        if importance is not None:
            mean = importance.reshape(-1, self.rotation).mean(1, keepdim=True)
            importance = mean.expand(-1, self.rotation).flatten()
        return self.base.fit(self.turned(weight), importance)

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        return self.base.refit(self.turned(weight), codes, params, free)

    def sums(self, values: Tensor) -> Tensor:
        return self.base.sums(values)

    def seal(self, params: Params) -> Params:
        return self.base.seal(params)

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        return self.base.encode(self.turned(weight), params, column)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        return self.turned(self.base.decode(codes, params, column))

    def turned(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, columns) in the basis of the codes, or out of it; FormatError where columns are left over."""
        if matrix.shape[1] % self.rotation:
            raise FormatError(
                f"{self}: {matrix.shape[1]} columns; a rotation turns {self.rotation} at a time; use a smaller one of "
                f"{', '.join(map(str, SIZES))}, or {self.base}"
            )
        return rotate_exactly(matrix, self.rotation)


def _is_plain(format: Format) -> bool:
    """Whether all params belong to rows or groups of neighbouring columns: none is a column's own."""
    columns = 256
    if rotation(format) or bands_of(format) is not None:
        return False
    return all(spec.shape[1] < columns for spec in format.param_specs(2, columns).values())


def as_rotated(format: Format) -> Rotated | None:
    """The format as one that rotates, None where it does not."""
    return format if isinstance(format, Rotated) else None


def without_rotation(format: Format) -> Format:
    """The format of the codes alone."""
    found = as_rotated(format)
    return format if found is None else found.base


def in_its_basis(packed: PackedWeight) -> PackedWeight | None:
    """The same bytes as a weight of the base: what rotated inputs are multiplied by; None where nothing is rotated."""
    found = as_rotated(packed.format)
    if found is None:
        return None
    return PackedWeight(packed.layout, found.base, packed.shape, packed.tensors, activations=packed.activations)


def refuse_shape(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why a matrix of that shape cannot be rotated so, in a clause; None where it can, or is not to be."""
    size = rotation(format)
    if not size or not shape[-1] % size:
        return None
    fitting = [f"+h{s}" for s in SIZES if not shape[-1] % s]
    use = f"use {fitting[-1]}" if fitting else f"use {without_rotation(format)}"
    return f"shape {list(shape)}; a rotation turns {size} columns at a time, which must divide the last; {use}"
