"""llama.cpp itself, where it is installed: an oracle called through ctypes.

PyPI's `xllamacpp` carries it prebuilt (`pip install --no-deps xllamacpp`), but not its quantizer of whole files; npm's
`@node-llama-cpp/linux-x64` does (`npm install --ignore-scripts`, then WHIT_LLAMA_CPP=node_modules/.../bins/linux-x64).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
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


@cache
def quantizer() -> ctypes.CDLL | None:
    """The shared object with llama.cpp's quantizer of whole files, None where WHIT_LLAMA_CPP does not lead to one."""
    folder = os.environ.get("WHIT_LLAMA_CPP")
    objects = sorted(Path(folder).glob("libllama.*so*")) if folder else []
    if not objects:
        return None
    loaded = ctypes.CDLL(str(objects[0]))
    backend = sorted(Path(str(folder)).glob("libggml.*so*"))[0]
    ctypes.CDLL(str(backend)).ggml_backend_load_all_from_path(str(folder).encode())
    return loaded


def needs_quantizer() -> pytest.MarkDecorator:
    """Skips where llama.cpp's quantizer of whole files is absent."""
    return pytest.mark.skipif(quantizer() is None, reason="WHIT_LLAMA_CPP does not name a folder with libllama.so")


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


class Opaque(ctypes.Structure):
    """Parameters passed by value whose fields differ between versions: more room than any needs."""

    _fields_ = (("words", ctypes.c_uint32 * 128),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


@cache
def _quiet(_: None = None) -> object:
    """llama.cpp's log, swallowed."""
    loaded = library()
    assert loaded is not None
    loaded.llama_log_set(_SILENT, None)
    loaded.llama_backend_init()
    return loaded


class LlamaCpp:
    """A GGUF file as llama.cpp runs it, on the CPU with one thread."""

    def __init__(self, path: Path) -> None:
        loaded = library()
        assert loaded is not None
        self._keep, self._c = _quiet(), loaded
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
            getattr(loaded, name).restype = ctypes.c_void_p
        loaded.llama_model_default_params.restype = Opaque
        loaded.llama_context_default_params.restype = Opaque
        loaded.llama_batch_init.restype = Batch
        loaded.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
        loaded.llama_get_logits.argtypes = [ctypes.c_void_p]
        loaded.llama_decode.argtypes = [ctypes.c_void_p, Batch]
        loaded.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Opaque]
        loaded.llama_init_from_model.argtypes = [ctypes.c_void_p, Opaque]
        loaded.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        loaded.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
        for name in ("llama_model_free", "llama_free"):
            getattr(loaded, name).argtypes = [ctypes.c_void_p]
        self._model = loaded.llama_model_load_from_file(str(path).encode(), loaded.llama_model_default_params())
        assert self._model, f"llama.cpp does not load {path}"
        self._vocab = loaded.llama_model_get_vocab(self._model)
        self.size = loaded.llama_vocab_n_tokens(self._vocab)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """What its own tokenizer makes of a text."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        call = self._c.llama_tokenize
        call.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32,
            ctypes.c_bool, ctypes.c_bool,
        ]  # fmt: skip
        count = call(self._vocab, data, len(data), room, len(room), special, True)
        assert count >= 0
        return list(room[:count])

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(tokens,) to logits (tokens, vocabulary), in a context of its own."""
        count = len(tokens)
        params = self._c.llama_context_default_params()
        for field in range(3):  # n_ctx, n_batch, n_ubatch
            params.words[field] = max(count, 32)
        if params.words[7] == params.words[8] == 4:  # n_threads, n_threads_batch: their defaults
            params.words[7] = params.words[8] = 1
        context = self._c.llama_init_from_model(self._model, params)
        assert context
        batch = self._c.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert self._c.llama_decode(context, batch) == 0
        found = np.ctypeslib.as_array(self._c.llama_get_logits(context), (count, self.size)).copy()
        self._c.llama_free(context)
        return torch.from_numpy(found)

    def close(self) -> None:
        self._c.llama_model_free(self._model)


def quantize_file(source: Path, out: Path, file_type: int) -> None:
    """llama.cpp's own quantizer of whole files, `file_type` by its number."""
    loaded = quantizer()
    assert loaded is not None
    loaded.llama_log_set(_SILENT, None)
    loaded.llama_model_quantize_default_params.restype = Opaque
    params = loaded.llama_model_quantize_default_params()
    params.words[0], params.words[1] = 1, file_type  # nthread, ftype
    call = loaded.llama_model_quantize
    call.restype = ctypes.c_uint32
    call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Opaque)]
    assert call(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
