"""slab.cu compiled for the CPU: clusters of blocks, and the copies of Hopper as loops."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.gpu import slab
from whit.kernels.gpu.slab import Config
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

import emulated

HEADERS = ("emulate", "emulate_cluster", "emulate_many", "emulate_slab")
DRIVER = 'extern "C" void run(const Params *p, int x) { run_clusters(x, THREADS, SPLITS, [&] { slab(*p); }); }'


@lru_cache
def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    return emulated.compiled(HEADERS, slab.SOURCE, DRIVER, macros)


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: Scheme, config: Config) -> Tensor:
    """As `kernel.multiply_slab`."""
    y = torch.full((len(x), packed.shape[0]), float("nan"), dtype=x.dtype)
    macros = config.macros(scheme, x.dtype == torch.float16, len(x))
    argument = slab.params(x, packed, bias, y, scheme, config, _map)
    library(tuple(macros.items())).run(ctypes.byref(argument), config.grid(packed.shape[0])[0])
    return y


def _map(address: int, rows: int, columns: int, tall: int, wide: int, size: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 16)(address, rows, columns, tall, wide, size)
