"""A packed weight as the compiled kernels read it: layout `bits` as it lies, and a struct of pointers to it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from whit.capabilities import product_dtype, radix, rotation
from whit.formats.ggml.fit import exponent_scale
from whit.kernels.cpu.binding import CODES, NESTED, NONE, TYPES, Library, WeightPlan
from whit.kernels.cpu.memory import in_huge_pages
from whit.layouts.digits import check_digits
from whit.tensor import Format, PackedWeight, Params, matrix_shape, tensor_param

LAYOUT = 1  # of what `prepare` makes; another number is another file of prepared weights (compiled/prepared)
LANE = 16  # the kernels' runs of columns that share params
NESTED_GROUP = 256
PARAMS: tuple[set[str], ...] = (
    {"scale"}, {"scale", "zero_point"}, {"absmax"}, {"d"}, {"d", "m"}, {"d", "scale"}, {"d", "dmin", "scale", "min"},
    {"exponent"},
)  # fmt: skip


@dataclass(frozen=True)
class CpuWeight(PackedWeight):
    """A packed weight with its plan; `held` keeps alive what the plan points to beside the tensors."""

    plan: WeightPlan
    address: int
    held: tuple[Tensor, ...]


def unsupported(packed: PackedWeight) -> str | None:
    """Why the kernels cannot read a weight, or None."""
    format = packed.format
    if packed.layout != "bits":
        return f"layout {packed.layout} is not bits"
    if rotation(format):
        return f"{format} wants its inputs rotated first"
    if format.vector_size != 1 or format.bits > 8:
        return f"{format} is not a format of up to 8 bits a weight"
    if (base := radix(format)) not in (None, 3):
        return f"codes of {format} lie in bytes of base {base}, not in bits or of base 3"
    if len(packed.shape) != 2 or 0 in packed.shape:
        return f"the weight's shape is {packed.shape}; it must be a matrix"
    if run_size(format) % LANE and run_size(format) < packed.shape[1]:
        return f"groups of {format.group_size} columns are not a multiple of {LANE}"
    specs = format.param_specs(*packed.shape)
    if {*specs} not in PARAMS:
        return f"params {', '.join(specs) or 'none'} are not known to it"
    nested = specs["absmax"].format if "absmax" in specs else None
    if nested is not None and (nested.bits, nested.group_size) != (8, NESTED_GROUP):
        return f"params in {nested} are not known to it"
    return None


def plan_weight(packed: PackedWeight, library: Library, move: bool) -> CpuWeight:
    """The weight with a plan; `move` takes its codes to huge pages, and mapped ones out of the file's."""
    format = packed.format
    rows, columns = matrix_shape(packed.shape)
    tensors = {key: tensor.contiguous() for key, tensor in packed.tensors.items()}
    if move:
        tensors["codes"] = in_huge_pages(tensors["codes"], source_goes=True)
    codes = tensors["codes"]
    if base := radix(format):
        check_digits(codes, base)
    levels = level_table(format)
    size = run_size(format)
    groups = -(-columns // format.group_size) * (format.group_size // size) if size else 1
    plan = WeightPlan(
        codes=codes.data_ptr(), rows=rows, columns=columns, groups=groups,
        row_bytes=-(-columns * format.bits // 8), digit_bytes=codes.shape[1] if base else 0,
        group_size=size or columns, levels=levels.data_ptr(), bits=format.bits,
        consecutive=is_consecutive(format), zero_type=NONE, parallel=library.parallel,
    )  # fmt: skip
    held = [levels]
    if "absmax_codes" in tensors:
        held.append(level_table(format.param_specs(rows, columns)["absmax"].format))  # type: ignore[arg-type]
        plan.scale, plan.scale_type, plan.scale_stride = tensors["absmax_codes"].data_ptr(), NESTED, groups
        plan.nested_levels, plan.nested_absmax = held[-1].data_ptr(), tensors["absmax_absmax"].data_ptr()
        plan.nested_offset = tensors["absmax_offset"].data_ptr()
    else:
        scale = level_scale(format, tensors)
        held.append(scale)
        plan.scale, plan.scale_type = scale.data_ptr(), TYPES[scale.dtype]
        plan.scale_stride = groups if scale.numel() > 1 else 0
    if "zero_point" in tensors:
        zero = tensors["zero_point"]
        plan.zero, plan.zero_type = zero.data_ptr(), TYPES.get(zero.dtype, CODES)
    if "d" in tensors:
        _add_offsets(plan, format, tensors)
    return CpuWeight(
        packed.layout, format, packed.shape, tensors, plan=plan, address=ctypes.addressof(plan), held=tuple(held),
        activations=packed.activations,
    )  # fmt: skip


def _add_offsets(plan: WeightPlan, format: Format, tensors: dict[str, Tensor]) -> None:
    """The offsets and superblocks of ggml's types."""
    for name, sign in (("m", -1), ("dmin", 1)):
        if name in tensors:
            plan.zero, plan.zero_type, plan.offsets = tensors[name].data_ptr(), TYPES[tensors[name].dtype], sign
    if "scale" in tensors:
        plan.subs = format.group_size // run_size(format)
        plan.sub_bits = format.param_specs(1, format.group_size)["scale"].bits
        plan.sub_bias = getattr(format, "scale_bias", 0)
        plan.sub_scale = tensors["scale"].data_ptr()
        plan.sub_min = tensors["min"].data_ptr() if "min" in tensors else None


def run_size(format: Format) -> int:
    """Neighbouring columns that share an effective scale; 0 stands for the whole row."""
    return getattr(format, "run_size", format.group_size)


def level_scale(format: Format, params: Params) -> Tensor:
    """By which levels are multiplied, as params hold it; where levels are codes (int8-absmax), their `row_scale`."""
    if "absmax" in params and product_dtype(format) == torch.int8:  # so a product rounds once
        scale: Tensor = format.row_scale(params)  # type: ignore[attr-defined]
        return scale
    if "exponent" in params:
        return exponent_scale(tensor_param(params, "exponent")).to(torch.bfloat16)  # powers of 2: exact
    return tensor_param(params, next(name for name in ("absmax", "d", "scale") if name in params))


def level_table(format: Format) -> Tensor:
    """What each stored code stands for under a `level_scale` of 1 and a zero point of 0: float32 (2^bits,)."""
    return _levels(format)[0]  # every format is hashable


def is_consecutive(format: Format) -> bool:
    """Whether neighbouring codes stand for numbers one apart."""
    return _levels(format)[1]


@cache
def exact_in(format: Format, dtype: torch.dtype) -> bool:
    """Whether a format's levels are numbers of `dtype`."""
    levels = level_table(format)
    return torch.equal(levels.to(dtype).to(levels.dtype), levels)


@cache
def _levels(format: Format) -> tuple[Tensor, bool]:
    count = 1 << format.bits
    with torch.inference_mode(False):
        table = torch.zeros(count)
        levels = getattr(format, "levels", None) or getattr(format, "integer_levels", None)
        if product_dtype(format) == torch.int8:
            table = torch.arange(count, dtype=torch.float32) + format.code_min
        elif levels is not None:  # fewer than 2^bits of them, perhaps
            table[: len(levels)] = torch.tensor(levels, dtype=torch.float32)
        else:
            codes = torch.arange(count, dtype=torch.int16) + format.code_min
            params = {
                name: torch.full(spec.shape, 0.0 if name == "zero_point" else 1.0)
                for name, spec in format.param_specs(1, count).items()
            }
            table = format.decode(codes.to(format.code_dtype).reshape(1, -1), params).reshape(-1).contiguous()
        return table, bool((table[1:] == table[:-1] + 1).all())
