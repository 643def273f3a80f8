"""stream.cu compiled for the CPU, to be tested where there is no GPU."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from whit.kernels.gpu import stream
from whit.kernels.gpu.stream import Config, Operands, Scheme
from whit.tensor import PackedWeight

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
DRIVER = """
extern "C" void run(const Params *p, int x, int y, int z) { run_grid({x, y, z}, THREADS, [&] { stream(*p); }); }
"""


@lru_cache
def library(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="emulated-"))
    source = folder / "kernel.cpp"
    source.write_text(f'#include "{HERE / "emulate.h"}"\n#include "{stream.SOURCE}"\n{DRIVER}')
    target = folder / f"{hashlib.sha1(repr(macros).encode()).hexdigest()}.so"
    flags = [f"-D{name}={value}" for name, value in macros]
    command = [str(COMPILER), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *flags, str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, scheme: Scheme, config: Config) -> Tensor:
    """What the kernel computes for x (rows, columns), block by block on the CPU."""
    rows, outs = x.shape[0], packed.shape[0]
    config = stream.fitted(config, scheme, x.shape[1])
    y = torch.full((rows, outs), float("nan"), dtype=x.dtype)
    grid = stream.grid(config, outs, rows)
    partial, arrived = torch.full((config.splits, rows, outs), float("nan")), torch.zeros(grid[0] * grid[2], dtype=torch.int32)
    operands = Operands(x, y, bias, packed.tensors, partial, arrived)
    macros = stream.macros(scheme, config, x.dtype == torch.float16, rows)
    library(tuple(macros.items())).run(ctypes.byref(stream.params(operands, scheme, config)), *grid)
    assert not arrived.any()
    return y
