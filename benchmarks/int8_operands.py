"""Weights and rows for the checks and times of int8_gpu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.activations import parse_activations
from whit.formats import parse_format
from whit.kernels.gpu import Gpu8
from whit.layouts import BITS
from whit.tensor import PackedWeight

DEVICE = "cuda"


def weight(shape: tuple[int, int], how: str, generator: torch.Generator, spec: str = "int8") -> PackedWeight:
    """Random codes as they lie in a file, prepared."""
    tensors = {"codes": torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE, generator=generator)}
    scale = torch.rand(shape[0], 1, device=DEVICE, generator=generator) * 0.01 + 0.001
    tensors |= dict.fromkeys(parse_format(spec).param_specs(*shape), scale)
    plain = PackedWeight(BITS.name, parse_format(spec), shape, tensors, activations=parse_activations(how))
    return Gpu8().prepare(plain)


def inputs(rows: int, columns: int, outliers: int, generator: torch.Generator) -> Tensor:
    """bfloat16 (rows, columns) below 6, but for so many columns that hold 20 in every seventh row."""
    x = torch.randn(rows, columns, device=DEVICE, generator=generator).clamp(-5, 5)
    which = torch.randperm(columns, device=DEVICE, generator=generator)[:outliers]
    x[::7, which] += 20
    return x.to(torch.bfloat16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)
