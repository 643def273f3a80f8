"""stream.cu compiled for the CPU, to be tested where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import dequantize as unpacking
from whit.kernels.gpu import few, nvrtc, stream, tiled
from whit.kernels.gpu.scales import Storage
from whit.kernels.gpu.stream import Config, Operands, Scheme
from whit.tensor import PackedWeight, matrix_shape

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
DRIVER = """
extern "C" void run(const {argument} *p, int x, int y, int z) {{
    run_grid({{x, y, z}}, THREADS, [&] {{ {kernel}(*p); }});
}}
"""


@lru_cache
def library(kernel: Path, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    driver = DRIVER.format(kernel=kernel.stem, argument="Several" if kernel == few.SOURCE else "Params")
    return compiled(("emulate",), kernel, driver, macros)


def compiled(headers: Sequence[str], kernel: Path, driver: str, macros: Iterable[tuple[str, int]]) -> ctypes.CDLL:
    """A kernel's source behind the headers, named without `.h`, that stand for a GPU; `driver` is what tests call."""
    folder = Path(tempfile.mkdtemp(prefix="emulated-"))
    source, target = folder / "kernel.cpp", folder / "kernel.so"
    included = (*(HERE / f"{name}.h" for name in headers), nvrtc.COMMON, kernel)
    source.write_text("".join(f'#include "{path}"\n' for path in included) + driver)
    flags = [f"-D{name}={value}" for name, value in macros]
    command = [str(COMPILER), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: Scheme, config: Config) -> Tensor:
    """What the kernel computes for x (rows, columns), block by block on the CPU."""
    rows, outs = x.shape[0], packed.shape[0]
    config = stream.fitted(config, scheme, x.shape[1])
    y = torch.full((rows, outs), float("nan"), dtype=x.dtype)
    grid = stream.grid(config, outs, rows)
    partial, arrived = (
        torch.full((config.splits, rows, outs), float("nan")),
        torch.zeros(grid[0] * grid[2], dtype=torch.int32),
    )
    operands = Operands(x, y, bias, packed, partial, arrived)
    macros = stream.macros(scheme, config, x.dtype == torch.float16, rows)
    library(stream.SOURCE, tuple(macros.items())).run(
        ctypes.byref(stream.params(operands, scheme, config.splits)), *grid
    )
    assert not arrived.any()
    return y


def tiled_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: Scheme, config: tiled.Config) -> Tensor:
    """What the kernel for more rows computes, without Hopper's instructions."""
    rows, outs = x.shape[0], packed.shape[0]
    config = tiled.fitted(config, scheme, x.shape[1])
    y, arranged = (
        torch.full((rows, outs), float("nan"), dtype=x.dtype),
        tiled.arranged_like(x, config).fill_(float("nan")),
    )
    lay = library(tiled.ARRANGE, tuple(tiled.arrange_macros(scheme, config.row_tiles).items()))
    laid = tiled.ArrangeParams(x.data_ptr(), arranged.data_ptr(), *x.shape)
    lay.run(ctypes.byref(laid), *tiled.arrange_grid(x, config))
    grid = tiled.grid(config, outs, rows)
    partial, arrived = (
        torch.full((config.splits, rows, outs), float("nan")),
        torch.zeros(grid[0] * grid[2], dtype=torch.int32),
    )
    operands = Operands(x, y, bias, packed, partial, arrived)
    macros = tiled.macros(scheme, config, x.dtype == torch.float16, wgmma=False)
    params = tiled.params(operands, arranged, scheme, config)
    library(tiled.SOURCE, tuple(macros.items())).run(ctypes.byref(params), *grid)
    assert not arrived.any()
    return y


def dequantize(packed: PackedWeight, dtype: torch.dtype, stored: Storage) -> Tensor:
    """What the dequantizing kernel computes."""
    w = torch.full(matrix_shape(packed.shape), float("nan"), dtype=dtype)
    params = unpacking.params(packed, w, stored)
    macros = unpacking.macros(packed, stored, dtype == torch.float16)
    kernel = library(unpacking.SOURCE, macros)
    kernel.run(ctypes.byref(params), -(-w.shape[0] // params.rows_per_block), 1, 1)
    return w


def few_linears(
    x: Tensor, packed: list[PackedWeight], bias: Tensor | None, scheme: Scheme, config: few.Config, cuts: int = 1
) -> list[Tensor]:
    """What the kernel for up to 16 rows computes for weights that share x, with few blocks that stay."""
    operands = []
    for weight in packed:
        y = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
        partial = torch.full((cuts, *y.shape), float("nan"))
        arrived = torch.zeros(-(-weight.shape[0] // 16), dtype=torch.int32)
        operands.append(Operands(x, y, bias, weight, partial, arrived))
    assert few.fits(scheme, config, x.shape[0])
    few_launch(operands, scheme, config, cuts, 3 * cuts)
    assert not any(each.arrived.any() for each in operands)
    return [each.y for each in operands]


def few_row(
    x: Tensor, packed: list[PackedWeight], scheme: Scheme, config: few.Config, ends: few.Ends, y: Tensor
) -> Tensor:
    """One row through weights with what `ends` say; y (outs) of each weight one after the other, filled."""
    ys = [y] * 2 if ends.gated else y.split([weight.shape[0] for weight in packed], 1)
    operands = [Operands(x, room, None, weight, None, None) for room, weight in zip(ys, packed, strict=True)]
    few_launch(operands, scheme, config, 1, 3, ends)
    return y


def map_of(
    address: int, rows: int, columns: int, tall: int, wide: int = 128, size: int = 1
) -> ctypes.Array[ctypes.c_uint64]:
    """A tensor map, as the headers that emulate its copies read it."""
    return (ctypes.c_uint64 * 16)(address, rows, columns, tall, wide, size)


def few_launch(
    operands: Sequence[Operands], scheme: Scheme, config: few.Config, cuts: int, multiprocessors: int,
    ends: few.Ends = few.PLAIN,
) -> None:  # fmt: skip
    """`few.launch` on the CPU."""
    macros = few.macros(scheme, config, few.case_of(operands, scheme, config, cuts, ends))
    blocks = few.grid(config, [each.y.shape[1] for each in operands], cuts, multiprocessors, ends.gated)
    params = few.params(operands, few.spread_of(scheme, config), cuts, ends)
    library(few.SOURCE, tuple(macros.items())).run(ctypes.byref(params), *blocks)


CLUSTERS = 'extern "C" void run(const Params *p, int x) {{ run_clusters(x, THREADS, CLUSTER, [&] {{ {}(*p); }}); }}'


@lru_cache
def cluster_library(kernel: Path, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    return compiled(("emulate", "emulate_cluster"), kernel, CLUSTERS.format(kernel.stem), macros)


def run_decoding(source, macros, grid, threads, shared, params, device):
    """`decoding.launch` on the CPU."""
    if "CLUSTER" in dict(macros):
        return cluster_library(source, macros).run(ctypes.byref(params), grid[0])
    stated = macros if "THREADS" in dict(macros) or source.stem == "attend" else (*macros, ("THREADS", threads))
    assert shared <= 16 << 14
    library(source, stated).run(ctypes.byref(params), *grid)
