"""The rows of a table in bands: those that are used most in a better format than the others.

`bands(q5_k:1024,q2_k)` holds 1024 rows of a (rows, columns) matrix in q5_k and all others in q2_k. In an embedding or a
head a row is a token of the vocabulary, a few tokens make up most of any text, and an error counts as often as its
token (the reverse water-filling of Shannon's rate-distortion theory, on rows). Which rows are used most is for the
calibration text to say (`methods.bands`).

Codes are (1, rows): the band in which each row lies. Within a band rows keep their order; each band is a param,
`band0`, `band1` and so on, itself a QuantizedTensor of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import NoReturn

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats.lowrank import side_car
from whit.tensor import Format, PackedWeight, Params, ParamSpec, tensor_param

PATTERN = re.compile(r"bands\((?P<parts>.+)\)")
MOST = 16


@dataclass(frozen=True)
class Bands:
    """`parts`: format and number of rows of each band, the most used rows first; the last one takes all that is left,
    and its number is 0."""

    parts: tuple[tuple[Format, int], ...]

    vector_size = 1
    code_min = 0
    code_dtype = torch.uint8
    continuous: tuple[str, ...] = ()
    row_independent = False
    searches = True
    product_dtype = None

    def __post_init__(self) -> None:
        *first, last = [count for _, count in self.parts] or [1]
        if not 2 <= len(self.parts) <= MOST or last or any(count < 1 for count in first):
            raise FormatError(
                f"{self}: bands are 2 to {MOST} formats, each but the last with its number of rows; write them as in "
                "bands(q5_k:1024,q2_k)"
            )
        for format, _ in self.parts:
            if not can_be_band(format):
                raise FormatError(f"{self}: {format} cannot be a band; one of up to 8 bits must be; choose another")

    def __str__(self) -> str:
        return f"bands({','.join(f'{format}:{count}' if count else str(format) for format, count in self.parts)})"

    @property
    def bits(self) -> int:
        return (len(self.parts) - 1).bit_length()

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, rows

    @property
    def group_size(self) -> int:
        """What must divide the columns."""
        return lcm(*(format.group_size or 1 for format, _ in self.parts))

    def counts(self, rows: int) -> tuple[int, ...]:
        """The number of rows in each band of a matrix; FormatError where it has too few."""
        if self.least_rows > rows:
            raise FormatError(f"{self}: for {rows} rows; there must be at least {self.least_rows}; use smaller bands")
        return tuple(count or rows - self.least_rows + 1 for _, count in self.parts)

    @property
    def least_rows(self) -> int:
        """The rows that a matrix must have, one in the last band."""
        return sum(count for _, count in self.parts) + 1

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        counts = zip(self.counts(rows), self.parts, strict=True)
        return {
            f"band{i}": ParamSpec((count, columns), torch.float32, format.bits, format)
            for i, (count, (format, _)) in enumerate(counts)
        }

    def assigned(self, use: Tensor) -> Tensor:
        """Codes (1, rows) for how often each row is used, (rows,); of equals the first is counted as used more."""
        order = use.argsort(descending=True, stable=True)
        counts = torch.tensor(self.counts(len(use)), device=use.device)
        codes = torch.empty(1, len(use), dtype=torch.uint8, device=use.device)
        codes[0, order] = torch.arange(len(counts), device=use.device).repeat_interleave(counts).to(torch.uint8)
        return codes

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        rows = torch.cat([tensor_param(params, f"band{i}") for i in range(len(self.parts))])
        return rows[places(codes)]

    def seal(self, params: Params) -> Params:
        return params

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> NoReturn:
        raise FormatError(
            f"{self}: nothing says which rows are used most; calibration text must; quantize an embedding or a head "
            "of a model"
        )

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> NoReturn:
        self.fit(weight)

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> NoReturn:
        self.fit(weight)

    def sums(self, values: Tensor) -> NoReturn:
        self.fit(values)


def can_be_band(format: Format) -> bool:
    """Whether rows of a table can have the format beside rows in others."""
    return format.bits < 16 and bands_of(format) is None and side_car(format) is None


def bands_of(format: Format) -> Bands | None:
    """The format as one of bands, None where it has none."""
    return format if isinstance(format, Bands) else None


def places(codes: Tensor) -> Tensor:
    """Where each row lies when the bands lie one below the other: int64 (rows,) for codes (1, rows)."""
    order = codes[0].argsort(stable=True)
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device)
    return found


def banded(packed: PackedWeight) -> tuple[PackedWeight, ...] | None:
    """The bands of a packed weight as packed weights; None where it has none. Its tensor `codes` is left out."""
    found = bands_of(packed.format)
    if found is None:
        return None
    parts = []
    for name, spec in found.param_specs(*packed.shape).items():
        assert spec.format is not None
        inner = {k.removeprefix(f"{name}_"): t for k, t in packed.tensors.items() if k.startswith(f"{name}_")}
        parts.append(PackedWeight(packed.layout, spec.format, spec.shape, inner))
    return tuple(parts)


def refuse_table(format: Format, shape: tuple[int, ...], vocabulary: int | None) -> str | None:
    """Why a parameter can have no such bands, in a clause; None where it can, or there are none.

    `vocabulary` is the number of tokens that its rows stand for, None where they stand for something else.
    """
    found = bands_of(format)
    if found is None:
        return None
    if vocabulary is None or shape[0] < vocabulary:
        return "no table with a row for each token; bands are for embeddings and heads; use another format"
    if shape[0] < found.least_rows:
        return f"{shape[0]} rows; there must be at least {found.least_rows}; use smaller bands"
    return None
