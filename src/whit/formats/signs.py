"""One and 1.58 bits: w = scale c, one positive scale per group of columns or per row.

`ternary` has c in {-1, 0, 1} (BitNet b1.58, Ma et al. 2024), five codes to a byte: 1.6 bits. `binary` has c in {-1, 1}
(XNOR-Net, Rastegari et al. 2016), stored as 0 and 1.

Both are fitted to the least squared error sum_j d_j (w_j - s c_j)^2, d the importance. Whatever s is, the codes that
are not 0 are best given to the k largest |w|, and for those s = sum d |w| / sum d, which lowers the error by
(sum d |w|)^2 / sum d. Binary has all of them: s is the weighted mean of |w|. Ternary tries every k, along the sorted
|w|, and so is exact but for the rounding of the stored scale. `-absmean` is what BitNet b1.58 trains with instead,
s = mean |w|, from which a weight of less than half becomes 0; `ternary-tensor-absmean` has one for the whole matrix, as
there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.formats.grouping import ROW, align, to_groups
from whit.formats.numeric import DTYPE_NAMES, check_fits, compute_dtype
from whit.formats.scaled import Scaled, group_size_in
from whit.tensor import Params, ParamSpec, tensor_param

PATTERN = re.compile(
    r"(?P<kind>ternary|binary)(?:-(?P<where>tensor|channel|g[1-9]\d*))?(?P<absmean>-absmean)?(?:-(?P<dtype>f32|bf16))?"
)


@dataclass(frozen=True)
class Signs(Scaled):
    """What the two share; `group_size` 0 is the whole row."""

    group_size: int = ROW
    scale_type: str = ""

    kind: ClassVar[str]
    vector_size = 1
    code_min = 0
    per_tensor = False
    continuous: ClassVar[tuple[str, ...]] = ("scale",)

    def __str__(self) -> str:
        scale = "" if self.scale_type == self.default_scale_type else self.scale_type
        return "-".join(filter(None, (self.kind, self.where, self.rule, scale)))

    @property
    def rule(self) -> str:
        """How the scale is fitted, where there is a choice."""
        return ""

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        return {"scale": self.scale_spec(rows, columns)}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        if "scale" not in free:
            return params
        old = tensor_param(params, "scale")
        signs = self._signs(codes).to(compute_dtype(weight))  # s = <w, c> / <c, c>
        best = self.sums(weight.to(signs.dtype) * signs) / self.sums(signs * signs).clamp(min=1)
        return {**params, "scale": torch.where(best > 0, best, old.to(best.dtype)).to(old.dtype)}

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        signs, scale = align(self._signs(codes), (tensor_param(params, "scale"),), column, self.group_size)
        return (signs * scale.to(torch.float32)).reshape(codes.shape)

    def _signs(self, codes: Tensor) -> Tensor:
        """c in float32."""
        raise NotImplementedError

    def _store(self, scale: Tensor) -> Tensor:
        dtype = DTYPE_NAMES[self.scale_type]
        check_fits(scale, dtype, f"{self}: scale")
        return scale.to(dtype)

    def _mean(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """The weighted mean of |w| (rows, groups), float64."""
        sizes, shares = self._sizes(weight, importance)
        return (sizes * shares).sum(dim=-1) / shares.sum(dim=-1)

    def _sizes(self, weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """|w| (rows, groups, size) in float64, whose squares do not overflow, and what each counts (1, groups, size).

        A group of no importance counts all of its columns alike; what fills up a short last group counts nothing.
        """
        columns = weight.shape[1]
        size = self.group_size or columns
        real = torch.ones(1, columns, dtype=torch.float64, device=weight.device)
        real = torch.nn.functional.pad(real, (0, -columns % max(size, 1))).reshape(1, -1, size)
        sizes = to_groups(weight, self.group_size).to(torch.float64).abs()
        if importance is None:
            return sizes, real
        shares = to_groups(importance.to(torch.float64).reshape(1, -1), self.group_size) * real
        return sizes, torch.where(shares.sum(dim=-1, keepdim=True) > 0, shares, real)


@dataclass(frozen=True)
class Ternary(Signs):
    """`ternary-g64` and, one scale per row, `ternary`. `absmean` fits as BitNet b1.58 does, `per_tensor` too."""

    absmean: bool = False
    per_tensor: bool = False

    kind: ClassVar[str] = "ternary"
    bits = 2
    radix = 3
    code_min = -1
    code_dtype = torch.int8

    @property
    def rule(self) -> str:
        return "absmean" if self.absmean else ""

    @classmethod
    def parse(cls, spec: str) -> Ternary | None:
        """`ternary-g64` and its like; None for other families."""
        if not (m := PATTERN.fullmatch(spec)) or m["kind"] != cls.kind:
            return None
        whole = m["where"] == "tensor"
        if whole and not m["absmean"]:
            raise FormatError(f"{spec}: one scale for a matrix is BitNet's; write ternary-tensor-absmean, or ternary")
        return cls(group_size_in(m["where"]), m["dtype"] or "", bool(m["absmean"]), whole)

    @property
    def searches(self) -> bool:
        return not self.absmean

    @property
    def product_dtype(self) -> torch.dtype | None:
        """int8 where there is one scale per row: BitLinear's product with 8-bit activations."""
        return None if self.group_size else torch.int8

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        best = self._mean(weight, None) if self.absmean else self._least(weight, importance)
        if self.per_tensor:  # rows are of one length
            best = best.mean().reshape(1, 1)
        # A group of zeros decodes to zeros at any scale; 1 is one by which can be divided.
        return {"scale": self._store(torch.where(best > 0, best.clamp(min=torch.finfo(torch.float32).tiny), 1.0))}

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        values, scale = align(
            weight.to(compute_dtype(weight)), (tensor_param(params, "scale"),), column, self.group_size
        )
        codes = (values / scale.to(values.dtype)).round_().clamp_(-1, 1)
        return codes.to(torch.int8).reshape(weight.shape)

    def _signs(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def _least(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """The scale (rows, groups) of the least weighted squared error, float64: every number k of codes is tried."""
        sizes, shares = self._sizes(weight, importance)
        sizes, order = sizes.sort(dim=-1, descending=True, stable=True)
        shares = shares.expand_as(sizes).gather(-1, order)
        sums, counts = (sizes * shares).cumsum(dim=-1), shares.cumsum(dim=-1)
        means = torch.where(counts > 0, sums / counts, 0.0)
        k = (sums * means).argmax(dim=-1, keepdim=True)
        return means.gather(-1, k).squeeze(-1)


@dataclass(frozen=True)
class Binary(Signs):
    """`binary-g64` and, one scale per row, `binary`."""

    kind: ClassVar[str] = "binary"
    bits = 1
    searches = True
    code_dtype = torch.uint8

    @classmethod
    def parse(cls, spec: str) -> Binary | None:
        """`binary-g64` and its like; None for other families."""
        if not (m := PATTERN.fullmatch(spec)) or m["kind"] != cls.kind:
            return None
        if m["absmean"]:
            raise FormatError(f"{spec}: binary scales are the mean of |w| anyway; leave out -absmean")
        if m["where"] == "tensor":
            raise FormatError(f"{spec}: binary scales are one per row or group; write binary, or binary-g64")
        return cls(group_size_in(m["where"]), m["dtype"] or "")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        # A group of zeros has the scale 0, the only one at which codes without a 0 stand for it.
        return {"scale": self._store(self._mean(weight, importance))}

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        return (weight >= 0).to(torch.uint8)

    def _signs(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32) * 2 - 1
