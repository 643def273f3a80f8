"""Activations: what a forward pass holds at its fullest moment, and what training keeps for the way back.

Per token of a layer, in elements, with h = hidden, i = intermediate, a = heads x head_dim, k = kv_heads x head_dim:

    attention   2 h + 4 a + 4 k    residual and input; queries, keys and values before and after rotation, the output
    MLP         2 h + 3 i          residual and input; gate, up and their product (2 i without a gate)
    norm        h + 2 h in float32

The fullest of the three, times tokens, is the peak of prefill (attention itself works on tiles). The output head adds
batch x vocabulary for the next token, once in the model's dtype and twice in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from whit.kernels import select
from whit.kernels.reference import CHUNK, Reference
from whit.layouts import BITS, WHOLE_BITS
from whit.layouts.whole import is_ternary
from whit.memory.cache import check_even, head_dim
from whit.methods import RTN
from whit.model.targets import Target
from whit.tensor import Format, matrix_shape

UNPACKING = 13  # bytes per weight that the reference kernel holds while it decodes: codes, float32, float32
SAMPLE_ROWS = 64


@dataclass(frozen=True)
class Widths:
    """Elements per token of one layer; `gated` says that the MLP multiplies two branches."""

    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    layers: int
    gated: bool

    @property
    def peak(self) -> int:
        """Elements per token alive at the fullest moment of a layer's forward pass, norms aside."""
        mlp = (3 if self.gated else 2) * self.intermediate
        return 2 * self.hidden + max(mlp, 4 * self.query + 4 * self.key_value)

    @property
    def saved(self) -> int:
        """Elements per token that autograd keeps of one layer, norms aside."""
        attention = self.hidden + 2 * self.query + 2 * self.key_value
        return attention + self.hidden + (4 if self.gated else 2) * self.intermediate


def widths(config: Any, model: nn.Module) -> Widths:
    """The widths that a configuration and its skeleton have; UnsupportedModelError where stages differ."""
    check_even(config)
    heads = getattr(config, "num_attention_heads", 0)
    dim = head_dim(config)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()} | {
        name.rpartition(".")[2] for name, _ in model.named_parameters()
    }
    return Widths(
        hidden=config.hidden_size,
        intermediate=_intermediate(config),
        query=heads * dim,
        key_value=kv_heads * dim,
        vocabulary=getattr(config, "vocab_size", 0),
        layers=getattr(config, "num_decoder_layers", None) or config.num_hidden_layers,
        gated=bool(names & {"gate_proj", "gate_up_proj", "wi_1", "w3"}),
    )


def _intermediate(config: Any) -> int:
    """Columns between the two halves of an MLP; experts that a token visits count together."""
    visited = getattr(config, "num_experts_per_tok", None)
    if visited:
        own = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return int(visited * own + (getattr(config, "shared_expert_intermediate_size", None) or 0))
    for name in ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"):
        found = getattr(config, name, None)
        if found:
            return max(found) if isinstance(found, list) else int(found)  # Gemma 3n: one for each block
    return 4 * int(config.hidden_size)


def prefill_bytes(w: Widths, tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes at the peak of one forward pass over `batch` prompts of `tokens`, and of its last tokens' logits."""
    per_token = max(w.peak * dtype.itemsize, w.hidden * (dtype.itemsize + 8))
    return batch * tokens * per_token + batch * w.vocabulary * (dtype.itemsize + 8)


def logits_bytes(w: Widths, tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of the logits of every position, as scoring a text needs them, beside one float32 chunk."""
    return batch * tokens * w.vocabulary * dtype.itemsize


def saved_bytes(w: Widths, dtype: torch.dtype) -> int:
    """Bytes per token that autograd keeps of one layer; each of its two norms keeps a float32 copy and its output."""
    return w.saved * dtype.itemsize + 2 * w.hidden * (4 + dtype.itemsize)


def kept_bytes(w: Widths, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes per token that the blocks keep for the backward pass, at its beginning.

    With checkpointing a layer keeps its input only, and one layer is computed again; without, all of it.
    """
    inputs = w.layers * w.hidden * dtype.itemsize
    return inputs + saved_bytes(w, dtype) if checkpointing else w.layers * saved_bytes(w, dtype)


def training_bytes(w: Widths, tokens: int, batch: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes kept for the backward pass at its beginning, the loss of every token with it: logits and their gradient in
    the dtype, and in float32 the log-softmax and its gradient."""
    logits = w.vocabulary * (2 * dtype.itemsize + 8)
    return batch * tokens * (kept_bytes(w, dtype, checkpointing) + logits)


def workspace_bytes(formats: Mapping[Target, Format], tokens: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the largest matrix that is dequantized whole, where no kernel here multiplies it packed.

    Asks the kernels' dispatch with a few rows of each format, for a prompt of `tokens` and for one token. A GPU need
    not be here to be asked: there a prompt's matrices are dequantized one at a time.
    """
    largest: dict[Format, int] = {}
    columns: dict[Format, int] = {}
    for target, format in formats.items():
        # Of a stack of experts one is multiplied at a time; an embedding decodes the rows that it is asked for.
        size = prod(target.shape[-2:]) if target.kind != "embedding" else 0
        largest[format] = max(largest.get(format, 0), size)
        columns[format] = matrix_shape(target.shape)[1]
    if device == "cuda":
        return max(largest.values(), default=0) * dtype.itemsize
    needs = [
        size * dtype.itemsize + UNPACKING * min(size, CHUNK)
        for format, size in largest.items()
        if size and _is_dequantized(format, columns[format], tokens, dtype)
    ]
    return max(needs, default=0)


def turned_bytes(formats: Mapping[Target, Format], device: str) -> int:
    """Bytes more than in the file that ternary matrices take where a Hopper GPU multiplies them (`GpuTernary`)."""
    if device != "cuda":
        return 0
    linears = ((target.shape, format) for target, format in formats.items() if target.kind in ("linear", "conv1d"))
    return sum(
        WHOLE_BITS.specs(format, shape)["codes"].nbytes - BITS.specs(format, shape)["codes"].nbytes
        for shape, format in linears
        if is_ternary(format) and shape[-1] % 64 == 0
    )


def _is_dequantized(format: Format, columns: int, tokens: int, dtype: torch.dtype) -> bool:
    weight = torch.linspace(-1, 1, SAMPLE_ROWS * columns).reshape(SAMPLE_ROWS, columns)
    packed = BITS.pack(RTN()(weight, None, format))
    return any(isinstance(select(packed, torch.ones(n, columns, dtype=dtype)), Reference) for n in {1, tokens})
