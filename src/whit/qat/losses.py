"""What training lessens: the distance from another model's predictions, from its hidden states, and from the text.

    distillation    KL(p || q) = sum_v p_v (log p_v - log q_v),  p the teacher's next-token distribution (Hinton 2015)
    text            -log q of the next token
    hidden          sum over layers of || h - h' ||^2 / || h' ||^2, h' the teacher's (per token)

Gradients in the logits are known in closed form, q - p; they are made in chunks of rows together with the loss and
take the place of what autograd would keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whit.methods.units import TINY

CHUNK = 1 << 24  # logits that are in float32 at a time


class _Known(torch.autograd.Function):
    """A loss whose gradient in the logits, its first argument, is computed on the way and kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None


class _Divergence(_Known):
    """sum over rows of KL(p_teacher || q)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float64)
        for rows in _chunks(logits):
            q = _log_softmax(logits[rows])
            p = _log_softmax(teacher[rows])
            weight = p.exp()
            total += (p.sub_(q).mul_(weight)).masked_fill_(weight == 0, 0.0).sum(dtype=torch.float64)
            gradient[rows] = q.exp_().sub_(weight)
        ctx.save_for_backward(gradient)
        return total


class _Text(_Known):
    """sum over rows of -log q of the targets (rows,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float64)
        for rows in _chunks(logits):
            q = _log_softmax(logits[rows])
            picked = targets[rows, None]
            total -= q.gather(1, picked).sum(dtype=torch.float64)
            gradient[rows] = q.exp_().scatter_add_(1, picked, q.new_full(picked.shape, -1.0))
        ctx.save_for_backward(gradient)
        return total


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """The sum of KL over the rows of logits (rows, vocabulary), float64."""
    return _Divergence.apply(logits, teacher)  # type: ignore[no-any-return, no-untyped-call]


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log q over the rows of logits (rows, vocabulary), float64."""
    return _Text.apply(logits, targets)  # type: ignore[no-any-return, no-untyped-call]


def hidden_loss(hidden: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over tokens of the mean over layers of the relative squared error, float64; the first is no layer's."""
    total = hidden[-1].new_zeros((), dtype=torch.float64)
    for own, exact in zip(hidden[1:], teacher[1:], strict=True):
        wanted = _wide(exact)
        error = (_wide(own) - wanted).square().sum(dim=-1)
        total = total + (error / wanted.square().sum(dim=-1).clamp(min=TINY)).sum(dtype=torch.float64)
    return total / max(len(hidden) - 1, 1)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 or wider, without a wide copy of the logits."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _wide(values: Tensor) -> Tensor:
    """In float32, or in float64 where they are in that."""
    return values if values.dtype == torch.float64 else values.float()


def _chunks(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    size = max(1, CHUNK // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
