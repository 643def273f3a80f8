"""Whole encoders in compiled code: the layers of BERT and its like, whose linears take quantized activations.

    h = norm(h + out(attention(qkv(h)))),  h = norm(h + down(gelu(up(h))))        (csrc/encoder.h)

Inputs that a recipe does not quantize are rounded to 16 bits, with a scale for 32 to 128 columns of a token: 2^-16 of
the largest there. A linear's codes become signed bytes in panels of 48 rows, four columns to a lane, beside what the
packed weight holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from whit.errors import KernelError
from whit.kernels.activated import product_format
from whit.kernels.cpu.binding import ISAS8, Library, Pointer
from whit.kernels.cpu.rows8 import GROUP, levels_of, padded
from whit.kernels.cpu.weight import level_scale, run_size, unsupported
from whit.layouts import BITS
from whit.tensor import PackedWeight

PANEL = 48  # rows of the weight that lie beside each other
MIDDLE = {False: 1 << 7, True: 1 << 15}  # the code of 0 in symmetric activations of 8 and of 16 bits
NO_WORD = -5  # a status of encoder.cpp
LONGEST = 128  # columns whose products of 16 and 8 bits fit a sum of 32


class LinearPlan(ctypes.Structure):
    """whit_linear8 of encoder.h."""

    _fields_: ClassVar = [
        *((name, Pointer) for name in ("panels", "scale", "start", "bias", "exact", "columns")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "stride", "group_size", "groups", "exact_count")),
        *((name, ctypes.c_int32) for name in ("per_group", "wide", "zero")),
        ("low", ctypes.c_float),
    ]


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
class Linear:
    """Packed weights of the same inputs, which become one product, and their biases."""

    weights: tuple[PackedWeight, ...]
    biases: tuple[Tensor | None, ...]


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
        plan = LayerPlan(*(self._linear(linear) for linear in (layer.qkv, layer.out, layer.up, layer.down)))
        for i, (weight, bias) in enumerate(layer.norms):
            plan.norm_weight[i], plan.norm_bias[i] = self._hold(weight.float()), self._hold(bias.float())
        return plan

    def _linear(self, linear: Linear) -> LinearPlan:
        parts = [_matrix(weight) for weight in linear.weights]
        how, first = linear.weights[0].activations, linear.weights[0].tensors
        wide = how is None
        if any(part.group_size != parts[0].group_size for part in parts) or any(
            other.activations != how or not _same_inputs(first, other.tensors) for other in linear.weights[1:]
        ):
            raise KernelError("linears of one input quantize it in different ways")
        levels, scale = torch.cat([part.levels for part in parts]), torch.cat([part.scale for part in parts])
        (outputs, inputs), groups = levels.shape, scale.shape[1]
        biases = [
            torch.zeros(len(part.levels)) if bias is None else bias.float()
            for part, bias in zip(parts, linear.biases, strict=True)
        ]
        size, stride = parts[0].group_size, padded(inputs)
        exact, low = first.get("input_columns"), first.get("input_low")
        floor = None if low is None or not bool(torch.isfinite(low)) else float(low)
        columns = torch.empty(0, dtype=torch.int64) if exact is None else exact.long()
        decoded = levels.float() * scale.repeat_interleave(size, dim=1)[:, :inputs]
        levels = levels.index_fill(1, columns, 0)
        sums = torch.nn.functional.pad(levels, (0, groups * size - inputs)).reshape(outputs, groups, size)
        bias = torch.cat(biases)
        if floor is not None:
            bias = bias + floor * decoded.index_fill(1, columns, 0).sum(1)
        zero = MIDDLE[wide] if floor is None else 0
        return LinearPlan(
            panels=self._hold(_panels(torch.nn.functional.pad(levels, (0, stride - inputs)))),
            scale=self._hold(_by_panel(scale)), start=self._hold(_by_panel(-zero * sums.sum(2, dtype=torch.int32))),
            bias=self._hold(_by_panel(bias[:, None])), exact=self._hold(_by_panel(decoded[:, columns])),
            columns=self._hold(columns.to(torch.int32)), inputs=inputs, outputs=outputs, stride=stride,
            group_size=size, groups=groups, exact_count=len(columns), wide=wide,
            per_group=how is None or how.granularity == "group", zero=zero, low=floor or 0.0,
        )  # fmt: skip

    def _hold(self, tensor: Tensor) -> int:
        self._held.append(tensor.detach().contiguous().clone())
        return int(self._held[-1].data_ptr())


@dataclass(frozen=True)
class _Matrix:
    levels: Tensor  # int8 (out, in)
    scale: Tensor  # float32 (out, groups)
    group_size: int


def _matrix(packed: PackedWeight) -> _Matrix:
    """A weight whose levels are signed bytes; KernelError where they are not, or activations are others."""
    if (reason := unfit(packed)) is not None:
        raise KernelError(reason)
    how, levels = packed.activations, levels_of(product_format(packed))
    assert not isinstance(levels, str)
    quantized = BITS.unpack(packed)
    stored = quantized.codes.to(torch.int16) - packed.format.code_min
    if levels.table is not None:
        stored = torch.tensor(list(levels.table), dtype=torch.int16)[stored.long()]
    rows, columns = packed.shape
    scale = level_scale(packed.format, quantized.params)
    size = run_size(packed.format) or columns
    scale = (scale.float() * levels.unit).expand(rows, -1)
    if how is None or how.granularity == "group":
        finer = GROUP if how is not None or size % LONGEST else min(size, LONGEST)
        scale, size = scale.repeat_interleave(-(-size // finer), dim=1)[:, : -(-columns // finer)], finer
    return _Matrix((stored - levels.shift).to(torch.int8), scale, size)


def unfit(packed: PackedWeight) -> str | None:
    """Why the compiled encoder does not take a weight, or None."""
    how = packed.activations
    if how is not None and (how.dtype, how.kind, how.symmetric, how.threshold) != (torch.int8, "dynamic", True, 0.0):
        return f"activations {how}: those of a compiled encoder are dynamic, symmetric int8"
    if how is not None and how.granularity == "tensor":
        return f"activations {how}: those of a compiled encoder have a scale per token or finer"
    if (reason := unsupported(packed)) is not None:
        return reason
    if isinstance(levels := levels_of(product_format(packed)), str):
        return levels
    if {*packed.format.param_specs(*packed.shape)} not in ({"scale"}, {"absmax"}, {"d"}):
        return f"{packed.format}: it has more than a scale for each group"
    if packed.shape[1] % GROUP:
        return f"{packed.shape[1]} columns are no multiple of {GROUP}"
    return None


def _same_inputs(one: Any, other: Any) -> bool:
    keys = [key for key in (*one, *other) if key.startswith("input_")]
    return all(key in one and key in other and torch.equal(one[key], other[key]) for key in keys)


def _panels(levels: Tensor) -> Tensor:
    """int8 (out, stride) -> (panels, stride / 4, 48, 4), zeros where there are no rows."""
    rows, stride = levels.shape
    whole = torch.nn.functional.pad(levels, (0, 0, 0, -rows % PANEL))
    return whole.reshape(-1, PANEL, stride // 4, 4).transpose(1, 2)


def _by_panel(params: Tensor) -> Tensor:
    """(out, n) -> (panels, n, 48)."""
    whole = torch.nn.functional.pad(params, (0, 0, 0, -len(params) % PANEL))
    return whole.reshape(len(whole) // PANEL, PANEL, params.shape[1]).transpose(1, 2)
