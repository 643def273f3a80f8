"""many.cu compiled for the CPU: clusters of blocks, and Hopper's instructions as loops."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.gpu import many
from whit.kernels.gpu.many import Config, Product
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

import emulated

HEADERS = ("emulate", "emulate_cluster", "emulate_many")
DRIVER = """extern "C" void run(const Params *p, int x) {
    run_clusters(x, THREADS, APART == 2 ? SPLITS : CLUSTER, [&] { many(*p); });
}"""


@lru_cache
def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    return emulated.compiled(HEADERS, many.SOURCE, DRIVER, (*macros, ("BEGINS_AT", 1024)))


def linears(
    x: Tensor, packed: Sequence[PackedWeight], bias: Tensor | None, scheme: Scheme, config: Config, processors: int = 4
) -> list[Tensor]:
    """As `launches.by_many`, on so many multiprocessors."""
    ys = [torch.full((len(x), weight.shape[0]), float("nan"), dtype=x.dtype) for weight in packed]
    products = [Product(weight, bias, y) for weight, y in zip(packed, ys, strict=True)]
    kernel = library(tuple(config.macros(scheme, x.dtype == torch.float16, len(packed)).items()))
    room = many.meeting(x, products, config)
    if room.partial is not None:
        room.partial.fill_(float("nan"))
    argument = many.params(x, products, scheme, config, emulated.map_of, room)
    kernel.run(ctypes.byref(argument), config.grid([y.shape[1] for y in ys], len(x), processors)[0])
    assert room.arrived is None or not room.arrived.any()
    return ys
