"""A linear of a compiled encoder: packed weights of one input as levels of signed bytes, in panels, with their biases.

Inputs that a recipe does not quantize are rounded to 16 bits, with a scale for 32 to 128 columns of a token: 2^-16 of
the largest there. A linear's codes become signed bytes in panels of 48 rows, four columns to a lane, beside what the
packed weight holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.kernels.activated import product_format
from whit.kernels.cpu.binding import Pointer
from whit.kernels.cpu.rows8 import GROUP, levels_of, padded
from whit.kernels.cpu.weight import level_scale, run_size, unsupported
from whit.layouts import BITS
from whit.tensor import PackedWeight

PANEL = 48  # rows of the weight that lie beside each other
MIDDLE = {False: 1 << 7, True: 1 << 15}  # the code of 0 in symmetric activations of 8 and of 16 bits
LONGEST = 128  # columns whose products of 16 and 8 bits fit a sum of 32


class LinearPlan(ctypes.Structure):
    """whit_linear8 of encoder.h."""

    _fields_: ClassVar = [
        *((name, Pointer) for name in ("panels", "scale", "start", "bias", "exact", "columns")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "stride", "group_size", "groups", "exact_count")),
        *((name, ctypes.c_int32) for name in ("per_group", "wide", "zero")),
        ("low", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Linear:
    """Packed weights of the same inputs, which become one product, and their biases."""

    weights: tuple[PackedWeight, ...]
    biases: tuple[Tensor | None, ...]


def plan_linear(linear: Linear, hold: Callable[[Tensor], int]) -> LinearPlan:
    """The plan of a linear; `hold` keeps a tensor as long as the plan, and says where it lies."""
    matrix, how, first = _joined(linear.weights), linear.weights[0].activations, linear.weights[0].tensors
    levels, scale, size, wide = matrix.levels, matrix.scale, matrix.group_size, how is None
    (outputs, inputs), groups = levels.shape, scale.shape[1]
    bias = torch.cat([
        torch.zeros(weight.shape[0]) if bias is None else bias.float()
        for weight, bias in zip(linear.weights, linear.biases, strict=True)
    ])  # fmt: skip
    stride = padded(inputs)
    exact, low = first.get("input_columns"), first.get("input_low")
    floor = None if low is None or not bool(torch.isfinite(low)) else float(low)
    columns = torch.empty(0, dtype=torch.int64) if exact is None else exact.long()
    decoded = levels.float() * scale.repeat_interleave(size, dim=1)[:, :inputs]
    levels = levels.index_fill(1, columns, 0)
    sums = torch.nn.functional.pad(levels, (0, groups * size - inputs)).reshape(outputs, groups, size)
    if floor is not None:
        bias = bias + floor * decoded.index_fill(1, columns, 0).sum(1)
    zero = MIDDLE[wide] if floor is None else 0
    return LinearPlan(
        panels=hold(_panels(torch.nn.functional.pad(levels, (0, stride - inputs)))),
        scale=hold(_by_panel(scale)), start=hold(_by_panel(-zero * sums.sum(2, dtype=torch.int32))),
        bias=hold(_by_panel(bias[:, None])), exact=hold(_by_panel(decoded[:, columns])),
        columns=hold(columns.to(torch.int32)), inputs=inputs, outputs=outputs, stride=stride,
        group_size=size, groups=groups, exact_count=len(columns), wide=wide,
        per_group=how is None or how.granularity == "group", zero=zero, low=floor or 0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Matrix:
    levels: Tensor  # int8 (out, in)
    scale: Tensor  # float32 (out, groups)
    group_size: int


def _joined(weights: Sequence[PackedWeight]) -> _Matrix:
    """Weights below each other; KernelError where they take their input in different ways."""
    parts, first = [_matrix(weight) for weight in weights], weights[0]
    if any(part.group_size != parts[0].group_size for part in parts) or any(
        other.activations != first.activations or not _same_inputs(first.tensors, other.tensors)
        for other in weights[1:]
    ):
        raise KernelError("linears of one input quantize it in different ways")
    levels, scale = torch.cat([part.levels for part in parts]), torch.cat([part.scale for part in parts])
    return _Matrix(levels, scale, parts[0].group_size)


def _matrix(packed: PackedWeight) -> _Matrix:
    """A weight whose levels are signed bytes; KernelError where they are not, or activations are others."""
    if (reason := unfit(packed)) is not None:
        raise KernelError(reason)
    how, levels = packed.activations, levels_of(product_format(packed))
    assert not isinstance(levels, str)
    quantized = BITS.unpack(packed)
    stored = quantized.codes.to(torch.int16) - packed.format.code_min
    if levels.table is not None:
        stored = torch.tensor(list(levels.table), dtype=torch.int16)[stored.long()]
    rows, columns = packed.shape
    scale = level_scale(packed.format, quantized.params)
    size = run_size(packed.format) or columns
    scale = (scale.float() * levels.unit).expand(rows, -1)
    if how is None or how.granularity == "group":
        finer = GROUP if how is not None or size % LONGEST else min(size, LONGEST)
        scale, size = scale.repeat_interleave(-(-size // finer), dim=1)[:, : -(-columns // finer)], finer
    return _Matrix((stored - levels.shift).to(torch.int8), scale, size)


def unfit(packed: PackedWeight) -> str | None:
    """Why the compiled encoder does not take a weight, or None."""
    how = packed.activations
    if how is not None and (how.dtype, how.kind, how.symmetric, how.threshold) != (torch.int8, "dynamic", True, 0.0):
        return f"activations {how}: those of a compiled encoder are dynamic, symmetric int8"
    if how is not None and how.granularity == "tensor":
        return f"activations {how}: those of a compiled encoder have a scale per token or finer"
    if (reason := unsupported(packed)) is not None:
        return reason
    if isinstance(levels := levels_of(product_format(packed)), str):
        return levels
    if {*packed.format.param_specs(*packed.shape)} not in ({"scale"}, {"absmax"}, {"d"}):
        return f"{packed.format}: it has more than a scale for each group"
    if packed.shape[1] % GROUP:
        return f"{packed.shape[1]} columns are not a multiple of {GROUP}"
    return None


def _same_inputs(one: Any, other: Any) -> bool:
    keys = [key for key in (*one, *other) if key.startswith("input_")]
    return all(key in one and key in other and torch.equal(one[key], other[key]) for key in keys)


def _panels(levels: Tensor) -> Tensor:
    """int8 (out, stride) -> (panels, stride / 4, 48, 4), zeros where there are no rows."""
    rows, stride = levels.shape
    whole = torch.nn.functional.pad(levels, (0, 0, 0, -rows % PANEL))
    return whole.reshape(-1, PANEL, stride // 4, 4).transpose(1, 2)


def _by_panel(params: Tensor) -> Tensor:
    """(out, n) -> (panels, n, 48)."""
    whole = torch.nn.functional.pad(params, (0, 0, 0, -len(params) % PANEL))
    return whole.reshape(len(whole) // PANEL, PANEL, params.shape[1]).transpose(1, 2)
