"""llama.cpp as a peer: its own quantizer and its own products, where a Python binding carries its library.

The original goes into a GGUF file in 16 bits by whit, llama.cpp quantizes that file, and the result answers like a
causal language model of transformers: token ids in, logits out, with a cache that goes on where it stopped.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import whit
from whit.errors import EvaluationError
from whit.integrations.loading import load_config

PACKAGE, INSTALL = "llama_cpp_py_sync", "llama-cpp-py-sync"
FILE_TYPES = {"q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_0": 2, "q3_k_m": 12, "q2_k": 10}  # llama_ftype
CONTEXT = 2048  # tokens that a context has room for at least
PHYSICAL = 512  # tokens that it computes at a time


def loader(file_type: str) -> Callable[[str, str], Any]:
    """What quantizes a model to one of FILE_TYPES and loads the result."""

    def load(model: str, device: str) -> LlamaCpp:
        if device != "cpu":
            raise EvaluationError(f"llama.cpp:{file_type}: runs on the CPU alone here; compare it with --device cpu")
        folder = tempfile.TemporaryDirectory(prefix="whit-llama-cpp-")  # lives as long as the model
        source, out = Path(folder.name) / "source.gguf", Path(folder.name) / "model.gguf"
        whit.quantize(model, source, whit.Recipe(rules=[("*", "bf16")]), export="gguf")
        quantize_file(source, out, FILE_TYPES[file_type])
        source.unlink()
        return LlamaCpp(out, load_config(model), folder)

    return load


def quantize_file(source: Path, out: Path, file_type: int) -> None:
    """llama.cpp's own quantizer of whole files."""
    c, ffi = _library()
    params = ffi.new("llama_model_quantize_params *", c.llama_model_quantize_default_params())
    params.nthread, params.ftype = torch.get_num_threads(), file_type
    if status := c.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise EvaluationError(f"llama.cpp: could not quantize the model (status {status}); see what it printed")


class LlamaCpp:
    """A GGUF file as llama.cpp runs it on the CPU. One sequence at a time has a cache."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, path: Path, config: Any, folder: Any = None) -> None:
        self.path, self.config, self._folder = path, config, folder
        self._c, self._ffi = _library()
        self._model = self._c.llama_model_load_from_file(str(path).encode(), self._c.llama_model_default_params())
        if self._model == self._ffi.NULL:
            raise EvaluationError(f"llama.cpp: does not load the {config.model_type} model; see what it printed")
        self._vocabulary = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self._context, self._room, self._used = None, 0, 0

    def __call__(
        self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 0, **_: Any
    ) -> SimpleNamespace:
        """Logits (rows, tokens, vocabulary) in float32, of the last `logits_to_keep` tokens if that is not 0."""
        rows = []
        for row in input_ids.tolist():
            if past_key_values is None:
                self._restart(len(row))
            rows.append(self._decode(row, logits_to_keep or len(row)))
        return SimpleNamespace(logits=torch.stack(rows), past_key_values=self)

    def get_memory_footprint(self) -> int:
        """Bytes of the file, which is mapped into memory."""
        return self.path.stat().st_size

    def save_pretrained(self, folder: str) -> None:
        """The file, copied."""
        shutil.copy(self.path, folder)

    def close(self) -> None:
        """Give llama.cpp's memory back."""
        if self._context is not None:
            self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

    def _restart(self, tokens: int) -> None:
        """An empty cache with room for so many tokens and a continuation."""
        self._used = 0
        if self._context is not None and tokens <= self._room:
            self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            self._c.llama_free(self._context)
        params = self._c.llama_context_default_params()
        self._room = max(tokens, CONTEXT)
        params.n_ctx = params.n_batch = self._room
        params.n_ubatch = PHYSICAL
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._context = self._c.llama_init_from_model(self._model, params)
        if self._context == self._ffi.NULL:
            raise EvaluationError(f"llama.cpp: has no memory for {self._room} tokens; use a shorter --context")

    def _decode(self, tokens: list[int], wanted: int) -> Tensor:
        """Logits (wanted, vocabulary) of the last tokens, which come after those that the cache holds."""
        count = len(tokens)
        if self._used + count > self._room:
            raise EvaluationError(f"llama.cpp: its cache has room for {self._room} tokens; write fewer")
        batch = self._c.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._used + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, int(i >= count - wanted)
            if status := self._c.llama_decode(self._context, batch):
                raise EvaluationError(f"llama.cpp: could not compute {count} tokens (status {status})")
        finally:
            self._c.llama_batch_free(batch)
        self._used += count
        size = wanted * self._vocabulary * torch.float32.itemsize
        data = bytearray(self._ffi.buffer(self._c.llama_get_logits(self._context), size))
        return torch.frombuffer(data, dtype=torch.float32).view(wanted, self._vocabulary)


def _library() -> tuple[Any, Any]:
    """llama.cpp's C functions by name, and cffi's view of its types."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    c, ffi = get_lib(), get_ffi()
    c.llama_backend_init()
    return c, ffi
