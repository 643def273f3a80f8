"""What lies between the products of a decoder when it makes one token, besides attention (attention.py): norms, gates.

Each is one launch, in bfloat16 or float16, and rounds where the modules of transformers do (normalize.cu, gate.cu).
Around the blocks lie the head of one row in 16 bits (dense.cu) and the choice of a token (choose.cu).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.kernels.gpu import nvrtc
from whit.kernels.gpu.nvrtc import Dims, Macros

HERE = Path(__file__).parent
NORM, GATE, DENSE, CHOOSE = (HERE / f"{name}.cu" for name in ("normalize", "gate", "dense", "choose"))
GATE_THREADS, CHOOSE_THREADS = 256, 1024
DENSE_THREADS, DENSE_BLOCKS = 256, 2  # of a block; blocks of a multiprocessor
LEAST_DENSE = 1 << 15  # outs of a weight that dense.cu reads faster than torch does
Run: TypeAlias = Callable[[Path, Macros, Dims, int, int, ctypes.Structure, torch.device], None]


class NormParams(ctypes.Structure):
    """The argument of normalize.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("residual", "added", "weight", "y")), ("epsilon", ctypes.c_float),
    )  # fmt: skip


class GateParams(ctypes.Structure):
    """The argument of gate.cu."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("gate", "up", "y")), ("units", ctypes.c_int))


class DenseParams(ctypes.Structure):
    """The argument of dense.cu."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "w", "y")), ("outs", ctypes.c_int))


class ChooseParams(ctypes.Structure):
    """The argument of choose.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "stops", "padding", "ended", "chosen", "column", "tokens")),
        ("vocabulary", ctypes.c_int), ("length", ctypes.c_int),
    )  # fmt: skip


def launch(
    source: Path, macros: Macros, grid: Dims, threads: int, shared: int, params: ctypes.Structure, device: torch.device
) -> None:
    """Enqueue a kernel on torch's current stream, in clusters where its macros say so."""
    where = nvrtc.stream_on(device.index)
    cluster = dict(macros).get("CLUSTER", 1)
    nvrtc.built(source, macros, device.index).launch_early(grid, threads, shared, params, where, cluster)


def half(x: Tensor) -> int:
    """1 for float16, 0 for bfloat16. Raises KernelError for other types."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise KernelError(f"decoding kernels: x is {x.dtype}; it must be bfloat16 or float16; convert the model")
    return int(x.dtype == torch.float16)


def norm_threads(columns: int) -> int:
    """A thread per eight columns, up to 512."""
    return min(max(-(-columns // 8 // 32) * 32, 32), 512)


def norm(residual: Tensor, added: Tensor | None, weight: Tensor, epsilon: float, run: Run = launch) -> Tensor:
    """residual (rows, columns) += added, in place; its RMS norm times weight (columns,). Columns: a multiple of 8."""
    rows, columns = residual.shape
    y = torch.empty_like(residual)
    threads, adds = norm_threads(columns), int(added is not None)
    macros = (("HALF", half(residual)), ("COLUMNS", columns), ("THREADS", threads), ("ADDED", adds))
    params = NormParams(
        residual.data_ptr(), None if added is None else added.data_ptr(), weight.data_ptr(), y.data_ptr(), epsilon
    )
    run(NORM, macros, (rows, 1, 1), threads, 128, params, residual.device)
    return y


def gate(gates: Tensor, ups: Tensor, run: Run = launch) -> Tensor:
    """silu(gates) * ups, elementwise; as many elements as a multiple of 8."""
    y = torch.empty_like(gates)
    units = gates.numel() // 8
    macros = (("HALF", half(gates)), ("THREADS", GATE_THREADS))
    params = GateParams(gates.data_ptr(), ups.data_ptr(), y.data_ptr(), units)
    run(GATE, macros, (-(-units // GATE_THREADS), 1, 1), GATE_THREADS, 0, params, gates.device)
    return y


def dense_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether dense.cu is for x (rows, columns) and a weight (outs, columns): one row, and many outs."""
    like = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    lies = weight.is_contiguous() and weight.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    return like and lies and len(x) == 1 and x.shape[1] % 256 == 0 and len(weight) >= LEAST_DENSE


def dense(x: Tensor, weight: Tensor, y: Tensor, multiprocessors: int, run: Run = launch) -> None:
    """y (1, outs) = x (1, columns) times a weight (outs, columns) of its own type, where `dense_takes`."""
    macros = (("HALF", half(x)), ("COLUMNS", x.shape[1]), ("THREADS", DENSE_THREADS))
    params = DenseParams(x.data_ptr(), weight.data_ptr(), y.data_ptr(), len(weight))
    blocks = (multiprocessors * DENSE_BLOCKS, 1, 1)
    run(DENSE, macros, blocks, DENSE_THREADS, 2 * x.shape[1], params, x.device)


def choose_takes(logits: Tensor) -> bool:
    """Whether choose.cu is for logits (batch, vocabulary)."""
    return logits.dtype in (torch.bfloat16, torch.float16) and logits.shape[1] % 8 == 0


def choose(
    logits: Tensor, ends: tuple[Tensor, Tensor, Tensor], to: tuple[Tensor, Tensor, Tensor], run: Run = launch
) -> None:
    """The likeliest token of each row of logits (batch, vocabulary, a multiple of 8), put where the next step is.

    ends: the tokens that end a sequence (8,), the one that follows an end (1,), int64, and which sequences have ended
    (batch,) bool; to: chosen (batch, length), the column to fill (batch,), which becomes the next one, and tokens
    (batch, 1), int64.
    """
    (stops, padding, ended), (chosen, column, tokens) = ends, to
    macros = (("HALF", half(logits)), ("THREADS", CHOOSE_THREADS))
    borrowed = (logits, stops, padding, ended, chosen, column, tokens)
    params = ChooseParams(*(t.data_ptr() for t in borrowed), logits.shape[1], chosen.shape[1])
    run(CHOOSE, macros, (len(logits), 1, 1), CHOOSE_THREADS, 256, params, logits.device)
