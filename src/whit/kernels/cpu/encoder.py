"""Whole encoders in compiled code: the layers of BERT and its like, whose linears take quantized activations.

h = norm(h + out(attention(qkv(h)))),  h = norm(h + down(gelu(up(h))))        (csrc/encoder.h)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.kernels.cpu.binding import ISAS8, Library, Pointer
from whit.kernels.cpu.encoder_linear import Linear, LinearPlan, plan_linear

NO_WORD = -5  # a status of encoder.cpp


class LayerPlan(ctypes.Structure):
    """whit_layer8 of encoder.h."""

    _fields_: ClassVar = [
        *((name, LinearPlan) for name in ("qkv", "out", "up", "down")),
        *((name, Pointer * 2) for name in ("norm_weight", "norm_bias")),
    ]


class EmbeddingPlan(ctypes.Structure):
    """whit_embedding8 of encoder.h."""

    _fields_: ClassVar = [
        *((name, Pointer) for name in ("ids", "word", "beside", "norm_weight", "norm_bias")),
        ("words", ctypes.c_int64),
    ]


class EncoderPlan(ctypes.Structure):
    """whit_encoder8 of encoder.h."""

    _fields_: ClassVar = [
        ("layers", Pointer),
        *((name, ctypes.c_int64) for name in ("count", "size", "inner", "heads")),
        ("epsilon", ctypes.c_float),
        ("hidden", Pointer),
        *((name, ctypes.c_int64) for name in ("batch", "tokens")),
        ("mask", Pointer),
        *((name, ctypes.c_int64) for name in ("mask_batch", "mask_query", "mask_key")),
        ("embedding", EmbeddingPlan),
    ]


@dataclass(frozen=True)
class Layer:
    """A layer's linears, and (weight, bias) of the norm behind attention and of that behind the MLP."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    norms: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Embedding:
    """What the first layer's input is made of: norm(word[id] + beside[position]), all float32 and contiguous.

    `word` (words, size), `beside` (positions, size): positions and what else all tokens share; `norm` weight and bias.
    """

    word: Tensor
    beside: Tensor
    norm: tuple[Tensor, Tensor]


class Encoder:
    """All layers, ready to run. KernelError says what the compiled code does not cover."""

    def __init__(
        self, layers: Sequence[Layer], heads: int, epsilon: float, library: Library, isa: str | None = None
    ) -> None:
        self.library, self.isa, self._held = library, ISAS8.index(isa or library.isas8[-1]), list[Tensor]()
        self.size, self.heads, self.epsilon = layers[0].norms[0][0].numel(), heads, epsilon
        self.inner = layers[0].up.weights[0].shape[0]
        if self.size % 64 or (self.size // heads) % 16 or self.inner % 64:
            raise KernelError(
                f"an encoder of {self.size} columns in {heads} heads, {self.inner} within; columns must be multiples "
                "of 64 and those of a head of 16"
            )
        self.plans = (LayerPlan * len(layers))(*(self._layer(layer) for layer in layers))

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """float32 (batch, tokens, size), contiguous, is replaced and returned.

        `mask` is bool, to be broadcast to (batch, 1, tokens, tokens): which tokens (last) a token sees.
        """
        return self._run(hidden, mask, EmbeddingPlan())

    def of_tokens(self, ids: Tensor, embedding: Embedding, mask: Tensor | None = None) -> Tensor:
        """float32 (batch, tokens, size) for ids int64 (batch, tokens); IndexError where one is no word."""
        ids, word = ids.contiguous(), embedding.word
        plan = EmbeddingPlan(
            ids=ids.data_ptr(), word=word.data_ptr(), beside=embedding.beside.data_ptr(),
            norm_weight=embedding.norm[0].data_ptr(), norm_bias=embedding.norm[1].data_ptr(), words=len(word),
        )  # fmt: skip
        return self._run(torch.empty(*ids.shape, self.size), mask, plan)

    def _run(self, hidden: Tensor, mask: Tensor | None, embedding: EmbeddingPlan) -> Tensor:
        plan = EncoderPlan(
            layers=ctypes.addressof(self.plans), count=len(self.plans), size=self.size, inner=self.inner,
            heads=self.heads, epsilon=self.epsilon, hidden=hidden.data_ptr(), batch=hidden.shape[0],
            tokens=hidden.shape[1], embedding=embedding,
        )  # fmt: skip
        if mask is not None:
            seen = mask.expand(hidden.shape[0], 1, hidden.shape[1], hidden.shape[1])
            plan.mask = seen.data_ptr()
            plan.mask_batch, _, plan.mask_query, plan.mask_key = seen.stride()
        library = self.library
        status = library.encode8(
            ctypes.addressof(plan), library.parallel, library.team_size, self.isa, torch.get_num_threads()
        )  # fmt: skip
        if status == NO_WORD:
            raise IndexError("input_ids: a token is none of the embedding's words; each must be; use its own tokenizer")
        if status:
            raise MemoryError(f"the CPU encoder could not run ({status})")
        return hidden

    def _layer(self, layer: Layer) -> LayerPlan:
        plan = LayerPlan(*(plan_linear(linear, self._hold) for linear in (layer.qkv, layer.out, layer.up, layer.down)))
        for i, (weight, bias) in enumerate(layer.norms):
            plan.norm_weight[i], plan.norm_bias[i] = self._hold(weight.float()), self._hold(bias.float())
        return plan

    def _hold(self, tensor: Tensor) -> int:
        self._held.append(tensor.detach().contiguous().clone())
        return int(self._held[-1].data_ptr())
