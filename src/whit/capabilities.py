"""What some formats have in addition to what every `Format` has. Code asks these functions, never for a format's class.

Each reads an attribute of the format that has the function's name, and says what holds where there is none.
"""

from __future__ import annotations

import torch

from whit.tensor import Format


def radix(format: Format) -> int | None:
    """How many codes there are where these are stored as digits of a byte (3: five to a byte); None: in whole bits."""
    found: int | None = getattr(format, "radix", None)
    return found


def product_dtype(format: Format) -> torch.dtype | None:
    """int8 or float8_e4m3fn where a weight is codes of that type times one scale per row (or per tensor), else None.

    Such a format has `row_scale(params)`: float32 (rows, 1) or (1, 1), with w = code row_scale.
    """
    found: torch.dtype | None = getattr(format, "product_dtype", None)
    return found


def in_bytes(format: Format) -> Format:
    """The format of the same codes and params whose levels products of bytes take; those of tables are rounded."""
    found: Format | None = getattr(format, "in_bytes", None)
    return found or format


def rotation(format: Format) -> int:
    """How many neighbouring columns of the matrix are turned together before they are encoded; 0 for none."""
    found: int = getattr(format, "rotation", 0)
    return found


def rounded(format: Format) -> tuple[str, ...]:
    """Integer params in which `decode` is linear, given as floats: those that training can move and round again."""
    found: tuple[str, ...] = getattr(format, "rounded", ())
    return found


def learned(format: Format) -> tuple[str, ...]:
    """The params that training moves: `continuous` ones, or those that the format calls `learned`, and `rounded`."""
    found: tuple[str, ...] = getattr(format, "learned", format.continuous)
    return (*found, *rounded(format))


def code_count(format: Format) -> int:
    """How many codes there are, from `code_min` upwards."""
    return radix(format) or 1 << format.bits


def codes_shape(format: Format, rows: int, columns: int) -> tuple[int, int]:
    """The shape of the codes of a (rows, columns) matrix: its own, unless the format has a `codes_shape`."""
    found: tuple[int, int] = getattr(format, "codes_shape", lambda *own: own)(rows, columns)
    return found
