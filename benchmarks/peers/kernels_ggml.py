"""ggml's products of its own types on its CPU backend, for kernels.py: the libraries of the package ggml-python."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Shape = tuple[int, int]
Made = tuple[Callable[[], object], int]


class Params(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


TYPES = {"int4-g128": 2, "nf4": 20, "int3-g128": 11, "int2-g128": 10, "int8-channel": 8, "q4_k": 12}  # ggml_type
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
PROTOTYPES: dict[str, tuple[Any, ...]] = {  # the result first
    "init": (POINTER, Params), "new_tensor_2d": (POINTER, POINTER, INT, LONG, LONG),
    "backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER), "nbytes": (ctypes.c_size_t, POINTER),
    "backend_tensor_set": (None, POINTER, POINTER, ctypes.c_size_t, ctypes.c_size_t),
    "new_graph_custom": (POINTER, POINTER, ctypes.c_size_t, ctypes.c_bool), "mul_mat": (POINTER, *[POINTER] * 3),
    "build_forward_expand": (None, POINTER, POINTER), "backend_graph_compute": (INT, POINTER, POINTER),
    "quantize_chunk": (ctypes.c_size_t, INT, POINTER, POINTER, LONG, LONG, LONG, POINTER),
    "backend_cpu_init": (POINTER,), "backend_cpu_set_n_threads": (None, POINTER, INT),
    "backend_cpu_buffer_type": (POINTER,), "backend_buft_name": (ctypes.c_char_p, POINTER),
}  # fmt: skip


def ggml_library() -> dict[str, Any]:
    """ggml's functions, from the shared libraries that the package ggml-python built for this processor."""
    (place,) = [Path(entry) / "ggml" / "lib" for entry in sys.path if (Path(entry) / "ggml" / "lib").is_dir()]
    base = ctypes.CDLL(str(place / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(place / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    found: dict[str, Any] = {}
    for name, (result, *arguments) in PROTOTYPES.items():
        function = getattr(cpu if name.startswith("backend_cpu") else base, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
        found[name] = function
    repacking = cpu["_Z35ggml_backend_cpu_repack_buffer_typev"]  # C++; llama.cpp asks for it by way of a registry
    repacking.restype = POINTER
    return {**found, "repacking_buffer_type": repacking}


def ggml(repacked: bool) -> Callable[[str, Shape, int, int], Made]:
    """ggml's own graph of products on its CPU backend, weights as they lie or in its repacking buffers."""

    def make(format: str, shape: Shape, rows: int, copies: int) -> Made:
        gg, kind, (outs, columns) = ggml_library(), TYPES[format], shape
        backend = gg["backend_cpu_init"]()
        gg["backend_cpu_set_n_threads"](backend, torch.get_num_threads())
        plain = gg["backend_cpu_buffer_type"]()
        weights, work = (gg["init"](Params(1 << 22, None, True)) for _ in range(2))
        matrices = [gg["new_tensor_2d"](weights, kind, columns, outs) for _ in range(copies)]
        size = gg["nbytes"](matrices[0])
        place = gg["repacking_buffer_type"]() if repacked else plain
        if not gg["backend_alloc_ctx_tensors_from_buft"](weights, place):
            raise MemoryError("ggml gave no buffer")
        codes = _quantized(gg, kind, shape, size)
        for matrix in matrices:
            gg["backend_tensor_set"](matrix, codes, 0, size)
        x = gg["new_tensor_2d"](work, 0, columns, rows)
        graph = gg["new_graph_custom"](work, 4 * copies + 16, False)
        for matrix in matrices:
            gg["build_forward_expand"](graph, gg["mul_mat"](work, matrix, x))
        gg["backend_alloc_ctx_tensors_from_buft"](work, plain)
        floats = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        gg["backend_tensor_set"](x, floats.data_ptr(), 0, floats.nbytes)

        def run() -> None:
            if status := gg["backend_graph_compute"](backend, graph):
                raise RuntimeError(f"ggml says {status}")

        return run, size

    return make


def _quantized(gg: dict[str, Any], kind: int, shape: Shape, size: int) -> Any:
    """Rows quantized by ggml, repeated."""
    outs, columns = shape
    floats = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    part = ctypes.create_string_buffer(size // outs * 64)
    gg["quantize_chunk"](kind, floats.data_ptr(), part, 0, 64, columns, None)
    return ctypes.create_string_buffer(part.raw * (outs // 64), size)
