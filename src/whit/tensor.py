"""The values that travel through whit: formats, quantized tensors and packed weights.

A matrix is always (out_features, in_features) here; a tensor of more dimensions is quantized along its last one,
its leading dimensions flattened into rows. `w ~ decode(codes, params)`, codes are integers, params are floats or
integers that a group of `format.group_size` neighbouring columns shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol, TypeAlias, Union, runtime_checkable

import torch
from torch import Tensor

from whit.errors import FormatError
from whit.named import require
from whit.rotation import rotate_exactly

Params: TypeAlias = Mapping[str, Union[Tensor, "QuantizedTensor"]]


@dataclass(frozen=True)
class ParamSpec:
    """What one parameter of a format looks like for a matrix of a given shape.

    `bits` is the stored width of an element: 32 for float32, 4 for a 4-bit zero point. A `format` says that the
    parameter is itself a QuantizedTensor of `shape` in that format (double quantization).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    format: Format | None = None


@runtime_checkable
class Format(Protocol):
    """Which numbers exist. A frozen, hashable value; `parse_format(str(format)) == format`.

    `group_size` counts the input columns that share parameters, 0 stands for the whole row. `vector_size` counts
    columns coded jointly (1: scalar). Codes lie in [code_min, code_max] and take `bits` bits each when packed. What
    else a format may have (codes that are digits, integer params that training moves, codes of another shape than the
    matrix, ...) is asked for by the functions of `capabilities`.
    """

    def __hash__(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def vector_size(self) -> int: ...
    @property
    def code_min(self) -> int: ...
    @property
    def code_dtype(self) -> torch.dtype: ...
    @property
    def continuous(self) -> tuple[str, ...]:
        """Names of the real-valued params, which `refit` can move."""
        ...

    @property
    def row_independent(self) -> bool:
        """Whether fitting some rows of a matrix gives those rows of the whole matrix's (unsealed) params."""
        ...

    @property
    def searches(self) -> bool:
        """Whether `fit` itself looks for the least (weighted) squared error: no other search need go around it."""
        ...

    def sums(self, values: Tensor) -> Tensor:
        """(rows, columns) summed over the elements that share params, in the shape of the (unsealed) params.

        Where params are finer than `group_size` (sub-scales) that is the shape of the coarsest.
        """
        ...

    def param_specs(self, rows: int, columns: int) -> Mapping[str, ParamSpec]:
        """The params of a (rows, columns) matrix, in the order in which they are stored."""
        ...

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        """Params for a whole float matrix (rows, columns); `importance` (columns,) weighs squared errors."""
        ...

    def refit(self, weight: Tensor, codes: Tensor, params: Params, free: tuple[str, ...]) -> Params:
        """Params with the `free` ones moved to the least squared error for the given codes."""
        ...

    def seal(self, params: Params) -> Params:
        """The params as they are stored (double quantization happens here); sealing twice changes nothing."""
        ...

    def encode(self, weight: Tensor, params: Params, column: int = 0) -> Tensor:
        """Floats (rows, n), which are columns [column, column + n) of the matrix, to codes (rows, n)."""
        ...

    def decode(self, codes: Tensor, params: Params, column: int = 0) -> Tensor:
        """Codes (rows, n), which are columns [column, column + n) of the matrix, to float32 (rows, n)."""
        ...


@dataclass(frozen=True)
class QuantizedTensor:
    """The logical value: integer codes and the params that turn them back into floats.

    `shape` is the original tensor's; `codes` is (rows, columns) with rows the product of the leading dimensions.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    params: Params = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The floats that the codes stand for, in the original shape."""
        return self.format.decode(self.codes, self.params).to(dtype).reshape(self.shape)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same value on another device."""
        params = {name: value.to(device) for name, value in self.params.items()}
        return QuantizedTensor(self.format, self.shape, self.codes.to(device), params)


@runtime_checkable
class Activated(Protocol):
    """How the inputs of a packed weight are quantized (`activations.Activations`); hashable."""

    def __hash__(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def kind(self) -> str: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def granularity(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def exact(self) -> int: ...


@dataclass(frozen=True)
class PackedWeight:
    """The physical value: named tensors in a named layout, as a module holds them and a file stores them.

    - `activations`: how its inputs are quantized; None: they are not. With static scales, `tensors` also has
      `input_scale` float32 (1,) and, where these are asymmetric, `input_zero_point` int8 (1,). With columns that stay
      exact it has `input_columns` int32 (exact,) and `input_low` float32 (1,), the low end of the codes or -infinity.
    - `deterministic`: a row of a product must have the same bits whatever rows are beside it.
    """

    layout: str
    format: Format
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    activations: Activated | None = field(default=None, kw_only=True)
    deterministic: bool = field(default=False, kw_only=True)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw at the input x of a linear. All but the first two are None where they were not asked for.

    - `hessian` (in, in) float32: the sum of x x^T over `token_count` tokens.
    - `drift` (in, in): the sum of (x~ - x) x^T, where x~ is what the linear would see if nothing before it were
      quantized.
    - `magnitude` (in,): the sum of |x|. `peak` (in,): the largest |x|.
    - `sample` (tokens, in) float32: some of the x themselves.
    """

    hessian: Tensor
    token_count: int
    drift: Tensor | None = None
    magnitude: Tensor | None = None
    peak: Tensor | None = None
    sample: Tensor | None = None

    def rescaled(self, scale: Tensor) -> LayerStats:
        """The statistics of x / scale, scale (in,) positive: what a linear sees whose columns were multiplied by it."""
        drift = None if self.drift is None else self.drift / scale[:, None] / scale
        magnitude = None if self.magnitude is None else self.magnitude / scale
        peak = None if self.peak is None else self.peak / scale
        sample = None if self.sample is None else self.sample / scale
        return LayerStats(self.hessian / scale[:, None] / scale, self.token_count, drift, magnitude, peak, sample)

    def rotated(self, size: int) -> LayerStats:
        """The statistics of x rotated in runs of `size` columns (`rotation.rotate`), without those of |x|."""
        hessian, drift = _turned(self.hessian, size), None if self.drift is None else _turned(self.drift, size)
        sample = None if self.sample is None else rotate_exactly(self.sample, size)
        return LayerStats(hessian, self.token_count, drift, sample=sample)


def _turned(sums: Tensor, size: int) -> Tensor:
    return rotate_exactly(rotate_exactly(sums, size).T, size).T


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def bits_per_weight(packed: PackedWeight) -> float:
    """Every stored bit, scales and zero points included, divided by the number of weights.

    FormatError for anything but a PackedWeight: a QuantizedTensor, for one, does not say how it is stored.
    """
    require(packed, PackedWeight, "bits_per_weight", "pack it first: whit.layouts.BITS.pack(quantized)", FormatError)
    return 8 * packed.nbytes / max(prod(packed.shape), 1)


def tensor_param(params: Params, name: str) -> Tensor:
    """A param that is a plain tensor; a nested one comes back dequantized."""
    value = params[name]
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of matrices, one or a stack of them, with rows and columns changed about."""
    return (*shape[:-2], shape[-1], shape[-2])


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix: leading dimensions flattened; a scalar is 1 x 1."""
    if not shape:
        return 1, 1
    return prod(shape[:-1]), shape[-1]
