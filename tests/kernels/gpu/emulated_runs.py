"""Random weights of ggml's types, ternary and binary; and many.cu compiled for the CPU for ggml's types."""

from __future__ import annotations

import ctypes

import torch
from emulated_many import library
from torch import Generator, Tensor

from whit.formats import parse_format
from whit.kernels.gpu import many, runs_many
from whit.kernels.gpu.runs_row import kind_of
from whit.layouts import BITS
from whit.tensor import PackedWeight

import emulated


def random_packed(spec: str, outs: int, columns: int, random: Generator) -> PackedWeight:
    """Random bytes for codes and integers, small positive numbers for the rest: every code and sub-scale occurs."""
    format = parse_format(spec)
    tensors: dict[str, Tensor] = {}
    for name, want in BITS.specs(format, (outs, columns)).items():
        if want.dtype == torch.uint8:
            most = 243 if name == "codes" and spec.startswith("ternary") else 256
            low, most = (110, 130) if name == "exponent" else (0, most)
            tensors[name] = torch.randint(low, most, want.shape, dtype=torch.uint8, generator=random)
        else:
            tensors[name] = (torch.rand(want.shape, generator=random) * 0.02 + 0.01).to(want.dtype)
    return PackedWeight(BITS.name, format, (outs, columns), tensors)


def many_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, cut: many.Cut, processors: int = 4) -> Tensor:
    """As `runs_many.call`, on so many multiprocessors."""
    config = runs_many.cut_for(kind_of(packed), cut)
    one = many.Product(packed, bias, torch.full((len(x), packed.shape[0]), float("nan"), dtype=x.dtype))
    kernel = library(tuple(runs_many.macros(kind_of(packed), config, x.dtype == torch.float16).items()))
    room = many.meeting(x, [one], config)
    if room.partial is not None:
        room.partial.fill_(float("nan"))
    argument = runs_many.params(x, one, config, emulated.map_of, room)
    kernel.run(ctypes.byref(argument), config.grid([packed.shape[0]], len(x), processors)[0])
    assert room.arrived is None or not room.arrived.any()
    return one.y
