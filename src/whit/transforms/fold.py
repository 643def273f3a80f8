"""Scales folded into a block: what consumes an activation is multiplied, what makes it is divided.

With s (channels,) the scale: norm weights and biases, output rows of linears and their biases become w / s; input
columns of consumers become w s. The model computes what it computed. What is stored in 16 bits is rounded, so

- a norm is divided and rounded first, and s is what that really came to, w / round(w / s): exact again;
- a linear that is kept in 16 bits and makes the activation is divided by powers of two, which change no digit;
- biases, and consumers that are kept (a router), are rounded like any 16-bit weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whit.model.graph import Folding
from whit.tensor import LayerStats
from whit.transforms.base import Consumer, Inputs, Rounding, Transform


@dataclass(frozen=True)
class Basis:
    """A block in its new basis: every parameter that changed, in float32 and the model's own shape, and by what the
    columns of the quantized ones were multiplied, (matrices, in) or (1, in). `note` says by what, for the account."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    note: str | None = None

    def stats(self, name: str, stats: tuple[LayerStats, ...]) -> tuple[LayerStats, ...]:
        """The statistics of a parameter, one per matrix, as it sees its input now."""
        if name not in self.scales:
            return stats
        scale = self.scales[name].expand(len(stats), -1)
        return tuple(s.rescaled(row) for s, row in zip(stats, scale, strict=True))


def rescale(
    transform: Transform,
    foldings: Sequence[Folding],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, tuple[LayerStats, ...]],
    rounding: Mapping[str, Rounding],
    dtypes: Mapping[str, torch.dtype],
    inputs: Mapping[str, Inputs] | None = None,
) -> Basis:
    """Search a scale for every activation that a quantized parameter consumes, and fold it.

    `weights` are a block's parameters, `stats` and `rounding` those of the quantized ones; `dtypes` the stored
    types; `inputs` how the quantized ones' inputs are rounded, where that is known.
    """
    changed: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    kept = {name: dtype for name, dtype in dtypes.items() if name not in rounding}
    for folding in foldings:
        quantized = [name for name in folding.consumers if name in rounding]
        if not quantized:
            continue
        now = {**weights, **changed}
        consumers = [
            Consumer(
                _matrices(now[n].to(torch.float32), n in folding.transposed),
                stats[n],
                rounding[n],
                (inputs or {}).get(n),
            )
            for n in quantized
        ]
        count = len(now[folding.weight]) if now[folding.weight].dim() == 3 else 1  # experts have scales of their own
        parts = [[c.matrix(i) for c in consumers] for i in range(count)] if count > 1 else [consumers]
        scale = torch.stack([transform.search(part, folding.channels) for part in parts])
        folded, scale = fold(folding, scale, now, kept)
        changed |= folded
        scales |= dict.fromkeys(quantized, scale)
    return Basis(changed, scales, f"rescaled by {transform.name}")


def fold(
    folding: Folding, scale: Tensor, weights: Mapping[str, Tensor], kept: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], Tensor]:
    """The parameters of a folding in float32, and the scale (matrices, in) that came of the one that was asked for.

    `kept` are the types of those that are not going to be quantized.
    """
    channels = folding.channels.to(scale.device)
    source = weights[folding.weight].to(torch.float32, copy=True)
    view = source[None, :, None] if folding.is_norm else _matrices(source, folding.weight in folding.transposed)
    by = torch.ones(len(view), view.shape[1], device=scale.device)
    by[:, channels] = scale
    if folding.is_norm:
        by = _divide_norm(view[0, :, 0], by[0], folding.offset, kept.get(folding.weight, torch.float32))[None]
    else:
        if kept.get(folding.weight, torch.float32).itemsize < 4:
            by = by.log2().round().exp2()
        view /= by[:, :, None]
    new = {folding.weight: source}
    if folding.bias is not None:
        new[folding.bias] = weights[folding.bias].to(torch.float32) / by[0]
    scale = by[:, channels]
    for name in folding.consumers:
        new[name] = weights[name].to(torch.float32, copy=True)
        columns = _matrices(new[name], name in folding.transposed)
        columns *= scale[:, None, :]
    return new, scale


def _divide_norm(weight: Tensor, by: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """Divide a norm's weight in place, as its type can hold it; returns by what. Channels that cannot be stay."""
    exact = weight + offset
    rounded = (exact / by - offset).to(dtype).to(torch.float32)
    came_to = exact / (rounded + offset)
    can = torch.isfinite(came_to) & (came_to > 0)
    weight.copy_(torch.where(can, rounded, weight))
    return torch.where(can, came_to, torch.ones_like(by))


def _matrices(weight: Tensor, transposed: bool) -> Tensor:
    """A view (matrices, out, in) of a parameter."""
    weight = weight.mT if transposed else weight
    return weight if weight.dim() == 3 else weight[None]
