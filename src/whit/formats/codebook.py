"""Codebooks: w = absmax * levels[code], one absmax per group of columns, the nearest level chosen.

NF4 is the 16-level table of QLoRA (Dettmers et al. 2023, appendix E), FP4 its 4-bit float, whose codes are the bit
patterns sign-exponent-mantissa. Double quantization stores absmax - mean(absmax) in the 8-bit dynamic table of the
same paper, 256 neighbours sharing one float32: (8 + 32 / 256) / 64 = 0.127 bits per weight at group 64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats.grouping import ROW, align, group_count, group_sums, to_groups
from whit.formats.numeric import check_fits, compute_dtype, constant
from whit.tensor import Format, Params, ParamSpec, QuantizedTensor, tensor_param

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(v / 12 for v in FP4_TWELFTHS) + tuple(-v / 12 for v in FP4_TWELFTHS)
MAX_LEVELS = 256
EXACT = 1e-6  # how near, relative to the largest, levels lie to integers times a unit where they are called so
TINY = 1e-38  # below this a group counts as zero: its reciprocal would overflow


@cache
def dynamic_levels() -> tuple[float, ...]:
    """The signed 8-bit dynamic table: 0, 1 and, for each decade 10^(e-6), e = 0..6, 2^e midpoints of [0.1, 1], +-."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive += (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return tuple(sorted([0.0, 1.0, *positive, *(-v for v in positive)]))


TABLES: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4, "dynamic8": dynamic_levels()}
PATTERN = re.compile(
    r"(?P<table>nf4|fp4|dynamic8|codebook\((?P<levels>[^()]*)\))(?:-(?P<where>channel|g[1-9]\d*))?"
    r"(?P<dq>-dq)?(?P<centered>-centered)?"
)


def byte_levels(levels: Sequence[float]) -> tuple[tuple[int, ...], float]:
    """Integers from -127 to 127 and the unit that makes them these levels (not all 0), or the nearest that can be.

    The unit is an n-th of the largest magnitude: for the first n at which no level is off by more than 1e-6 of the
    largest, otherwise for that of 1 to 127 with the least sum of squared differences. Each level counts once, for
    tables such as nf4 are made for all to occur about as often. nf4: 112, its levels off by .33 % in the root mean
    square, and .49 % where they occur as in normal data in groups of 64; no other unit is below .33 and .48 %.
    """
    largest = max(map(abs, levels))
    best: tuple[float, tuple[int, ...], float] | None = None
    for n in range(1, 128):
        unit = largest / n
        integers = tuple(round(level / unit) for level in levels)
        differences = [integer * unit - level for integer, level in zip(integers, levels, strict=True)]
        if max(map(abs, differences)) <= EXACT * largest:
            return integers, unit
        error = sum(difference * difference for difference in differences)
        if best is None or error < best[0]:
            best = error, integers, unit
    assert best is not None
    return best[1], best[2]


@dataclass(frozen=True)
class Codebook:
    """Any table of 2 to 256 `levels`, the largest magnitude 1: w = level absmax, one absmax for a group of columns.

    `double_quant` stores absmax itself in 8 bits. `centered` belongs to those nested formats: the mean of the whole
    tensor is subtracted, and values are rounded to 65,536 points of [-1, 1] before the nearest level is sought, as
    bitsandbytes does on a CPU. FormatError for a table or group size that cannot be.
    """

    levels: tuple[float, ...]
    group_size: int = 64
    double_quant: bool = False
    centered: bool = False

    vector_size = 1
    searches = False
    code_min = 0
    code_dtype = torch.uint8
    continuous = ("absmax",)

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= MAX_LEVELS:
            raise FormatError(f"codebook: {len(self.levels)} levels; a table has 2 to {MAX_LEVELS}; give that many")
        if not all(abs(v) <= 1 for v in self.levels) or max(map(abs, self.levels)) != 1:  # NaN fails too
            raise FormatError("codebook: the largest magnitude must be 1; divide the levels by it")

    def __str__(self) -> str:
        names = [name for name, levels in TABLES.items() if levels == self.levels]
        table = names[0] if names else "codebook(" + ",".join(map(repr, self.levels)) + ")"
        size = "" if self.group_size == 64 else f"-g{self.group_size}" if self.group_size else "-channel"
        return table + size + ("-dq" if self.double_quant else "") + ("-centered" if self.centered else "")

    @classmethod
    def parse(cls, spec: str) -> Codebook | None:
        """`nf4-g128-dq`, `fp4`, `codebook(-1,-0.25,0.25,1)-g32` and their like; None for other families."""
        if not (m := PATTERN.fullmatch(spec)):
            return None
        try:
            levels = TABLES.get(m["table"]) or tuple(float(v) for v in m["levels"].split(","))
        except ValueError:
            raise FormatError(f"{spec}: the levels must be numbers; separate them by commas") from None
        where = m["where"] or "g64"
        size = int(where[1:]) if where.startswith("g") else ROW
        return cls(levels, size, bool(m["dq"]), bool(m["centered"]))

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def nested(self) -> Format:
        """The format of absmax under double quantization."""
        return _absmax_format()

    @cached_property
    def in_bytes(self) -> Codebook:
        """The same codes and params with `byte_levels`, for products of bytes; itself where that changes no level.

        Tables of more than 16 levels are not such products, and stay as they are.
        """
        if self.bits > 4:
            return self
        integers, _ = byte_levels(self.levels)
        rounded = tuple(integer / max(map(abs, integers)) for integer in integers)
        near = all(abs(a - b) <= EXACT for a, b in zip(rounded, self.levels, strict=True))
        return self if near else replace(self, levels=rounded)

    @property
    def row_independent(self) -> bool:
        return not self.centered

    def sums(self, values: Tensor) -> Tensor:
        return group_sums(values, self.group_size)

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        groups = group_count(columns, self.group_size)
        if self.double_quant:
            # Its groups of 256 run on from row to row, hence one long row.
            return {"absmax": ParamSpec((1, rows * groups), torch.float32, 8, self.nested)}
        specs = {"absmax": ParamSpec((rows, groups), torch.float32, 32)}
        if self.centered:
            specs["offset"] = ParamSpec((1, 1), torch.float32, 32)
        return specs

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        values = weight.to(compute_dtype(weight))
        params: dict[str, Tensor] = {}
        if self.centered:
            params["offset"] = _mean(values).to(torch.float32).reshape(1, 1)
            values = values - params["offset"]
        absmax = to_groups(values, self.group_size).abs().amax(dim=-1)
        check_fits(absmax, torch.float32, f"{self}: absmax")
        return {"absmax": absmax.to(torch.float32), **params}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        if "absmax" not in free:
            return params
        levels = self._table(codes.device)[codes.long()]  # absmax = <w, l> / <l, l>
        best = group_sums(weight.to(torch.float32) * levels, self.group_size)
        best /= group_sums(levels * levels, self.group_size).clamp(min=TINY)
        return {**params, "absmax": torch.where(best > 0, best, self._absmax(params, len(codes)))}

    def seal(self, params: Params) -> Params:
        absmax = params["absmax"]
        if not self.double_quant or isinstance(absmax, QuantizedTensor):
            return params
        row = absmax.reshape(1, -1)
        inner = self.nested.fit(row)
        return {
            **params,
            "absmax": QuantizedTensor(self.nested, tuple(row.shape), self.nested.encode(row, inner), inner),
        }

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        dtype = compute_dtype(weight)
        reciprocal = 1.0 / self._absmax(params, len(weight)).clamp(min=TINY)
        centred = weight.to(dtype) - tensor_param(params, "offset") if self.centered else weight.to(dtype)
        values, aligned = align(centred, (reciprocal.to(dtype),), column, self.group_size)
        bounds, order = self._bounds
        scaled = values * aligned
        if self.centered:
            scaled = torch.where(aligned > 0.5 / TINY, -1.0, torch.floor((scaled + 1) * 32767.5 + 0.5) / 32767.5 - 1)
        codes = _count_below(scaled, bounds)
        if order is not None:
            codes = constant(order, torch.uint8, weight.device)[codes.int()]
        return codes.to(torch.uint8).reshape(weight.shape)

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        levels = self._table(codes.device)[codes.int()]
        values, absmax = align(levels, (self._absmax(params, len(codes)),), column, self.group_size)
        decoded = (values * absmax).reshape(codes.shape)
        return decoded + tensor_param(params, "offset") if self.centered else decoded

    def _absmax(self, params: Params, rows: int) -> Tensor:
        return tensor_param(params, "absmax").reshape(rows, -1)

    def _table(self, device: torch.device) -> Tensor:
        return constant(self.levels, torch.float32, device)

    @cached_property
    def _bounds(self) -> tuple[tuple[float, ...], tuple[int, ...] | None]:
        """Midpoints between neighbouring levels, and the code of each interval where codes are not in level order."""
        table = torch.tensor(self.levels, dtype=torch.float32)
        order = torch.argsort(table, stable=True)
        midpoints = tuple(((table[order[:-1]] + table[order[1:]]) / 2).tolist())
        is_sorted = bool((order[1:] > order[:-1]).all())
        return midpoints, None if is_sorted else tuple(order.tolist())


def _count_below(values: Tensor, bounds: tuple[float, ...]) -> Tensor:
    """How many of the sorted bounds lie below each value."""
    if len(bounds) >= 16:
        return torch.bucketize(values, constant(bounds, values.dtype, values.device), out_int32=True)
    # A handful of comparisons vectorises; the binary search of bucketize does not and takes three times as long.
    counts = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for bound in bounds:
        counts += values > bound
    return counts


@cache
def _absmax_format() -> Codebook:
    """Made once: a table of 256 levels takes longer to check than a small product takes on a GPU."""
    return Codebook(TABLES["dynamic8"], group_size=256, centered=True)


def _mean(values: Tensor) -> Tensor:
    """The mean, the same for any number of threads: torch splits whole-tensor sums of 32,768 elements and more."""
    flat = values.reshape(-1)
    if flat.numel() < 32768:
        return flat.mean()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 4096))
    partial = padded.reshape(-1, 4096).sum(dim=1, dtype=torch.float64)
    return torch.tensor(sum(partial.tolist()) / flat.numel(), dtype=torch.float64, device=values.device)
