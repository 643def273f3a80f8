"""llama.cpp itself, where it is installed (PyPI's `xllamacpp` carries it prebuilt): an oracle called through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch


@cache
def library() -> ctypes.CDLL | None:
    """The shared object with llama.cpp's C functions, None where it is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        return None
    objects = list(Path(found.origin).parent.glob("xllamacpp*.so"))
    return ctypes.CDLL(str(objects[0])) if objects else None


def needs_llama_cpp() -> pytest.MarkDecorator:
    """Skips where llama.cpp is absent."""
    absent = importlib.util.find_spec("xllamacpp") is None
    return pytest.mark.skipif(absent, reason="llama.cpp (pip install --no-deps xllamacpp) is not installed here")


def quantize_chunk(
    weight: torch.Tensor, number: int, row_bytes: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The bytes (rows, row_bytes) that llama.cpp's own quantizer makes of a float matrix in ggml's type `number`."""
    loaded = library()
    assert loaded is not None
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
    out = np.zeros((rows, row_bytes), dtype=np.uint8)
    counts = None if importance is None else np.ascontiguousarray(importance.numpy(), dtype=np.float32)
    call = loaded.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    written = call(
        number, source.ctypes.data, out.ctypes.data, 0, rows, columns, None if counts is None else counts.ctypes.data
    )
    assert written == out.size
    return torch.from_numpy(out)
