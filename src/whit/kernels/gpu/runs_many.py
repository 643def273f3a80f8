"""ggml's types through many.cu, for 5 rows and more on Hopper (many_runs.cuh says how their scales are applied)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.ggml.kinds import Kind
from whit.kernels.gpu import many, many_cuts, maps, nvrtc, runs_row, tuned
from whit.kernels.gpu.launches import Call, device_of
from whit.kernels.gpu.runs_row import fields, kind_of, pitches
from whit.kernels.gpu.scales import table
from whit.kernels.gpu.tables import Shape
from whit.kernels.gpu.tables_runs import RUNS_MANY
from whit.tensor import PackedWeight

LEAST_ROWS = 5  # fewer are faster in runs_row.cu or runs_few.cu


@dataclass(frozen=True)
class Config(many.Config):
    """As many.Config; `made`: bytes of a stage's factors for one row of W, and `wide` of its codes."""

    made: int = 0
    wide: int = many.STEP_BYTES

    @property
    def threads(self) -> int:
        return 128 * self.groups + 128

    @property
    def stage_bytes(self) -> int:
        return self.outs * (self.wide + self.made)


class Scales(ctypes.Structure):
    """Where scales and minima lie, field by field as in many.cu."""

    _fields_ = (("field", ctypes.c_void_p * 4), ("pitch", ctypes.c_int * 4))


class Weight(ctypes.Structure):
    """One of the weights, field by field as in many.cu."""

    _fields_ = (
        ("codes_map", ctypes.c_uint64 * 16), ("scales", Scales), ("bias", ctypes.c_void_p), ("y", ctypes.c_void_p),
        ("outs", ctypes.c_int), ("rest", ctypes.c_int * 15),  # the map makes it a multiple of 64 bytes
    )  # fmt: skip


def why_not(packed: PackedWeight) -> str | None:
    """Why the kernel cannot multiply such a weight, or None."""
    reason = runs_row.why_not(packed)
    if reason is not None:
        return reason
    step = many.STEPS[kind_of(packed).bits]
    return f"{packed.shape[1]} columns are no multiple of {step}" if packed.shape[1] % step else None


def cut_for(kind: Kind, cut: many.Cut) -> Config:
    """A cut for one of ggml's types."""
    step = many.STEPS[kind.bits]
    factors = 8 if kind.offset else 4
    made, wide = step // min(kind.sub_size, 32) * factors, step * kind.bits // 8
    return replace(Config(*cut), made=made, wide=wide)


@lru_cache(maxsize=4096)
def best(kind: Kind, shape: Shape, rows: int, device: tuned.Device) -> many.Config | None:
    """How x (rows, columns) and a weight of `shape` that `why_not` allows are cut; None where another way is faster."""
    if rows < LEAST_ROWS:
        return None
    weight = many_cuts.Weight(
        f"runs{kind.bits}", many.STEPS[kind.bits], bool(kind.levels), lambda cut: cut_for(kind, cut),
        many_cuts.lower_tiles,
    )  # fmt: skip
    return many_cuts.best(weight, RUNS_MANY.get(device[0], {}), shape, rows, device[1])


def macros(kind: Kind, config: many.Config, half: bool) -> dict[str, int]:
    """What many.cu is compiled with."""
    return config.cut_macros(bool(kind.levels), half, 1) | {
        "BITS": kind.bits, "CODEBOOK": int(bool(kind.levels)), "OFFSET": -kind.low, "ZERO": 0, "GROUP": kind.sub_size,
        "RUN": kind.sub_size, "SUBS": kind.subs if kind.scale_bits else 0, "INTEGER": kind.scale_bits or 8,
        "BIAS": kind.scale_bias, "NUMBER": 4 if kind.exponent else 1, "LESS": {"": 0, "m": 1, "min": 2}[kind.offset],
    }  # fmt: skip


def params(
    x: Tensor, one: many.Product, config: many.Config, mapped: many.Mapped = maps.tiles_of,
    room: many.Meeting = many.NOWHERE,
) -> ctypes.Structure:  # fmt: skip
    """The kernel's argument; it borrows the tensors' memory."""
    (rows, columns), (outs, _), kind, codes = (
        x.shape,
        one.packed.shape,
        kind_of(one.packed),
        one.packed.tensors["codes"],
    )
    wide = many.STEPS[kind.bits] * kind.bits // 8
    levels = table(tuple(map(float, kind.levels)), x.dtype, x.device) if kind.levels else None
    pointers = (ctypes.c_void_p * 4)(*(None if t is None else t.data_ptr() for t in fields(one.packed)))
    weight = Weight(
        mapped(codes.data_ptr(), outs, codes.shape[1], config.outs, wide, 1),
        Scales(pointers, (ctypes.c_int * 4)(*pitches(one.packed))),
        None if one.bias is None else one.bias.data_ptr(), one.y.data_ptr(), outs,
    )  # fmt: skip
    return many.several(1, Weight)(
        mapped(x.data_ptr(), rows, columns, config.box, 64, 2), many.maps_of_outs([one], config, mapped),
        (Weight * 1)(weight),
        *(None if t is None else t.data_ptr() for t in (levels, room.partial, room.arrived)), columns, rows,
    )  # fmt: skip


def call(x: Tensor, packed: PackedWeight, bias: Tensor | None, config: many.Config) -> Call:
    """Contiguous x (rows, columns), which begins at 16 bytes, through a weight that `why_not` allows."""
    kind, levels = kind_of(packed), bool(kind_of(packed).levels)
    config = config.for_outs([packed.shape[0]])
    one = many.Product(packed, bias, torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device))
    function = nvrtc.built(many.SOURCE, tuple(macros(kind, config, x.dtype == torch.float16).items()), x.device.index)
    grid = config.grid([packed.shape[0]], len(x), device_of(x)[1])
    room = many.meeting(x, [one], config)
    argument = params(x, one, config, room=room)
    launch = function.cut(grid, config.threads, config.shared_bytes(levels), argument, config.cluster)
    return Call(launch, x, [one.y], room.partial, room.arrived, config.box, bool(config.boxes))
