"""What training adds to the weights: adapters, gradients and the optimizer's moments (AdamW).

    full, weights in 16 bits    2 (gradient) + 4 (float32 copy) + 8 (two float32 moments) bytes a parameter
    full, weights in float32    4 + 8
    LoRA, QLoRA                 4 (adapter) + 4 + 8 bytes a parameter of the adapters, nothing for the base

An adapter of rank r beside a matrix (out, in) has r (in + out) parameters, in float32 as PEFT keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whit.errors import RecipeError
from whit.model.targets import Target

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTER_STATE = 16  # bytes: value, gradient, two moments, each float32


def full_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Gradients and optimizer of training every weight."""
    return parameters * (12 if dtype.itemsize == 4 else dtype.itemsize + 12)


def adapter_bytes(targets: Sequence[Target], names: Sequence[str], rank: int) -> int:
    """Adapters with their gradients and optimizer; `names` are last components, by default attention's four."""
    linears = [t for t in targets if t.kind in ("linear", "conv1d") and not t.kept_by_default]
    wanted = [t for t in linears if t.holder.rpartition(".")[2] in (names or ATTENTION)]
    if names and not wanted:
        near = ", ".join(sorted({t.holder.rpartition(".")[2] for t in linears}))
        raise RecipeError(f"target {', '.join(names)}: matches no linear; it must match one; there are {near}")
    chosen = wanted or linears  # architectures that call their projections otherwise: all of them
    return ADAPTER_STATE * rank * sum(t.shape[-1] + t.shape[-2] for t in chosen)
