"""slab.cu compiled for the CPU: clusters of blocks, and the copies of Hopper as loops."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.gpu import slab
from whit.kernels.gpu.many import Product
from whit.kernels.gpu.slab import Config
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

import emulated

HEADERS = ("emulate", "emulate_cluster", "emulate_many", "emulate_slab")
DRIVER = 'extern "C" void run(const Params *p, int x) { run_clusters(x, THREADS, SPLITS, [&] { slab(*p); }); }'


@lru_cache
def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    return emulated.compiled(HEADERS, slab.SOURCE, DRIVER, macros)


def linears(
    x: Tensor, packed: Sequence[PackedWeight], bias: Tensor | None, scheme: Scheme, config: Config
) -> list[Tensor]:
    """As `launches.by_slab`."""
    ys = [torch.full((len(x), weight.shape[0]), float("nan"), dtype=x.dtype) for weight in packed]
    products = [Product(weight, bias, y) for weight, y in zip(packed, ys, strict=True)]
    macros = config.macros(scheme, x.dtype == torch.float16, len(x), len(packed))
    argument = slab.params(x, products, scheme, config, emulated.map_of)
    library(tuple(macros.items())).run(ctypes.byref(argument), config.grid(*(y.shape[1] for y in ys))[0])
    return ys


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: Scheme, config: Config) -> Tensor:
    """As `launches.by_slab`."""
    return linears(x, [packed], bias, scheme, config)[0]
