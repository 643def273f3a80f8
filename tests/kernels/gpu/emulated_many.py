"""many.cu compiled for the CPU: clusters of blocks, and Hopper's instructions as loops."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import many, nvrtc
from whit.kernels.gpu.many import Config
from whit.kernels.gpu.stream import Scheme
from whit.tensor import PackedWeight

import emulated

HEADERS = tuple(emulated.HERE / f"{name}.h" for name in ("emulate", "emulate_cluster", "emulate_many"))
DRIVER = 'extern "C" void run(const Params *p, int x) { run_clusters(x, THREADS, CLUSTER, [&] { many(*p); }); }'


@lru_cache
def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="emulated-"))
    source, target = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text("".join(f'#include "{path}"\n' for path in (*HEADERS, nvrtc.COMMON, many.SOURCE)) + DRIVER)
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
    """As `kernel.multiply_many`, on so many multiprocessors."""
    y = torch.full((len(x), packed.shape[0]), float("nan"), dtype=x.dtype)
    kernel = library(tuple(config.macros(scheme, x.dtype == torch.float16).items()))
    argument = many.params(x, packed, bias, y, scheme, config, _map)
    kernel.run(ctypes.byref(argument), config.grid(y.shape[1], len(x), processors)[0])
    return y


def _map(address: int, rows: int, columns: int, tall: int, wide: int, size: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 16)(address, rows, columns, tall, wide, size)
