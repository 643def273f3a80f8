"""Scale refinement: the codes stay, each scale moves to where tr((W - Q) H (W - Q)^T) is least.

Q is linear in every param p that a format calls continuous: Q = Q0 + p D, D = decode(p = 1) - decode(p = 0). With
E = W - Q the best step of one group's p, all other groups held, is <D, E H> / <D, D H_gg>. Groups are visited in
order and each change is carried on to the later ones; a step is taken where it lessens the loss with p rounded to
the type in which it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whit.methods.feedback import walk
from whit.tensor import Format


def refit_scales(
    weight: Tensor, codes: Tensor, params: Mapping[str, Tensor], format: Format, hessian: Tensor
) -> dict[str, Tensor]:
    """New params (plain tensors, as `params`) for weight and codes (rows, columns), hessian (columns, columns)."""
    new = {name: value.clone() for name, value in params.items()}
    columns = weight.shape[1]
    size = format.group_size or max(columns, 1)
    groups = -(-columns // size)
    pull = ((weight.to(torch.float64) - format.decode(codes, new)) @ hessian).T.contiguous()  # (columns, rows)

    def choose(first: int, last: int) -> Tensor:
        local = {name: value.chunk(groups, dim=1)[first // size] for name, value in new.items()}
        square = hessian[first:last, first:last]
        change = torch.zeros_like(pull[first:last])
        for name in format.continuous:
            step = _step(codes[:, first:last], local, name, format, (pull[first:last] - square @ change).T, square)
            change += step.T
        return change

    walk(pull, hessian, choose, size, size)
    return new


def _step(
    codes: Tensor, local: Mapping[str, Tensor], name: str, format: Format, pull: Tensor, square: Tensor
) -> Tensor:
    """Move one param of one group in place; returns what that adds to the decoded weights (rows, n).

    `pull` (rows, n) is E H in the group's columns, `square` (n, n) is H there.
    """
    old = local[name]

    def decode(value: Tensor) -> Tensor:
        return format.decode(codes, {**local, name: value}).to(torch.float64)

    before = decode(old)
    direction = decode(torch.ones_like(old)) - decode(torch.zeros_like(old))
    steepness = format.sums(direction * (direction @ square))
    best = old + format.sums(direction * pull) / steepness.clamp(min=torch.finfo(torch.float32).tiny)
    new = best.to(old.dtype)
    new = torch.where(torch.isfinite(new) & ((new > 0) == (old > 0)), new, old)  # a scale stays positive
    step = decode(new) - before
    gain = (step * (2 * pull - step @ square)).sum(dim=1, keepdim=True)
    better = gain > 0 if len(old) == len(codes) else gain.sum() > 0
    old.copy_(torch.where(better, new, old))
    return decode(old) - before
