"""near.cu compiled for the CPU: clusters of blocks, and the copies of Hopper as loops."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import near, nvrtc
from whit.kernels.gpu.near import Config
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

import emulated

HEADERS = tuple(emulated.HERE / f"{name}.h" for name in ("emulate", "emulate_cluster", "emulate_many", "emulate_near"))
DRIVER = 'extern "C" void run(const Params *p, int x) { run_clusters(x, THREADS, 1, [&] { near(*p); }); }'


@lru_cache
def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="emulated-"))
    source, target = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text("".join(f'#include "{path}"\n' for path in (*HEADERS, nvrtc.COMMON, near.SOURCE)) + DRIVER)
    flags = [f"-D{name}={value}" for name, value in macros]
    command = [str(emulated.COMPILER), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *flags, str(source)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


def linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: Scheme, config: Config, processors: int = 4
) -> Tensor:
    """As `kernel.multiply_near`, on so many multiprocessors."""
    y = torch.full((len(x), packed.shape[0]), float("nan"), dtype=x.dtype)
    macros = config.macros(scheme, x.dtype == torch.float16, len(x))
    argument = near.params(x, packed, bias, y, scheme, _map)
    grid = config.grid(packed.shape[0], processors)
    library(tuple(macros.items())).run(ctypes.byref(argument), grid[0])
    return y


def _map(address: int, rows: int, columns: int, tall: int, wide: int, size: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 16)(address, rows, columns, tall, wide, size)
