"""New codes for a matrix that has moved a little since it was quantized: an adapter was merged into it.

A merged matrix W' = Q + D differs from the quantized Q mostly by less than half a step, so that rounding on the same
scales gives Q back, and rounding on new ones moves everything: either way the adapter is lost. What counts are the
outputs, tr((W' - Q') H (W' - Q')^T), and these are lessened

- on the `same` scales: by GPTQ's walk, and by coordinate descent from the codes of Q; of each row the better one;
- on `moved` scales: from there each scale is moved to its best value (`methods.scales`), then the codes again;
- on `new` scales: by GPTQ from nothing, as where D is so large that the old scales do not reach.

The one that loses least is taken. Where D lies in what a group shares (a multiple of Q's steps, or a constant where
zero points are real numbers, as QA-LoRA trains them), the codes stay and the params alone take it up: nothing is lost
but the rounding of the params.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.lowrank import product, side_car
from whit.methods.columns import Columns, plain_rows
from whit.methods.feedback import damped, factored
from whit.methods.gptq import GPTQ
from whit.methods.scales import refit_scales
from whit.methods.stack import energy
from whit.tensor import Format, LayerStats, Params, QuantizedTensor

DAMP = 0.01
ROWS = 8192  # solved at a time; fixed, so that results do not depend on the machine
SWEEPS = 4
TURNS = 2
WHOLE = 1 - 1e-6
WALK = 0.6  # of what GPTQ takes for a matrix, whose params it searches first
CONSTANTS = ("zero_point", "offset")  # params that add the same to all columns of a group


@dataclass(frozen=True)
class Regridded:
    """`share` of the squared change lies in the params of the format; `lossless` where it was all taken up by them.
    `scales` are the same, moved or new."""

    quantized: QuantizedTensor
    share: float
    lossless: bool
    scales: str


def effort(format: Format) -> float:
    """How many times what GPTQ takes a matrix takes: two searches, scales that move where they can, GPTQ itself."""
    fixed = not format.continuous or format.vector_size > 1 or getattr(format, "double_quant", False)
    turns = 0 if fixed else TURNS
    return 1 + WALK * (1 + (2 + turns) * SWEEPS)


def regrid(target: Tensor, present: QuantizedTensor, stats: LayerStats | None) -> Regridded:
    """Quantize `target` (out, in), which is near to `present`, in the format and with the params of `present`.

    Without `stats` every weight is rounded to its nearest level.
    """
    had = side_car(present.format)
    if had is not None:
        params = had.inner(present.params)
        inner = QuantizedTensor(had.base, present.shape, present.codes, params)
        found = regrid(target.to(torch.float32) - product(present.params), inner, stats)
        joined = had.join(found.quantized.params, present.params["low_rank_b"], present.params["low_rank_a"])  # type: ignore[arg-type]
        whole = QuantizedTensor(had, present.shape, found.quantized.codes, joined)
        return Regridded(whole, found.share, found.lossless, found.scales)
    target = target.to(torch.float32)
    share = share_in_params(target - present.dequantize(), present)
    if share >= WHOLE:
        return Regridded(_moved_params(target, present), share, True, "moved")
    if stats is None:
        return Regridded(_with_codes(present, present.format.encode(target, present.params)), share, False, "same")
    factor, shares = factored(stats.hessian, DAMP)
    hessian = damped(stats.hessian, shares)
    feedback = factor.div_(factor.diagonal()[:, None].clone())
    same = _with_codes(present, _searched(target, present, hessian, feedback))
    ways = {"same": same, "moved": _moved(target, same, hessian), "new": GPTQ()(target, stats, present.format)}
    best = min(ways, key=lambda scales: float(_lost(target, ways[scales], hessian).sum()))
    return Regridded(ways[best], share, False, best)


def share_in_params(change: Tensor, present: QuantizedTensor) -> float:
    """The share of ||change||^2 that a group's scale and, where it is a real number, its zero point can take up."""
    format = present.format
    change = change.to(torch.float64)
    whole = float(change.square().sum())
    free = _movable(present)
    if not whole or not free:
        return 1.0 if not whole else 0.0
    steps = present.dequantize().to(torch.float64)
    constant = any(name in CONSTANTS for name in free)
    ones = torch.ones_like(steps)
    count = format.sums(ones)

    def without_mean(values: Tensor) -> Tensor:
        return values - _spread(format.sums(values) / count, values) if constant else values

    centred, inside = without_mean(steps), without_mean(change)
    power = format.sums(centred.square()).clamp(min=torch.finfo(torch.float64).tiny)
    rest = inside - _spread(format.sums(centred * inside) / power, centred) * centred
    return max(1 - float(rest.square().sum()) / whole, 0.0)


def _movable(present: QuantizedTensor) -> tuple[str, ...]:
    """The real-valued params that are not quantized themselves."""
    return tuple(n for n in present.format.continuous if isinstance(present.params.get(n), Tensor))


def _spread(sums: Tensor, values: Tensor) -> Tensor:
    """One number for each group, repeated for its columns (rows, columns)."""
    rows, columns = values.shape
    size = -(-columns // sums.shape[1])
    return sums.expand(rows, -1).repeat_interleave(size, dim=1)[:, :columns]


def _moved_params(target: Tensor, present: QuantizedTensor) -> QuantizedTensor:
    """The same codes, with the params that are nearest to the target."""
    format, best = present.format, present
    names = _movable(present)
    for free in [*((name,) for name in names), names]:
        params: Params = format.refit(target, present.codes, present.params, free)
        found = QuantizedTensor(format, present.shape, present.codes, format.seal(params))
        best = min(best, found, key=lambda q: float((target - q.dequantize()).square().sum()))
    return best


def _searched(target: Tensor, present: QuantizedTensor, hessian: Tensor, feedback: Tensor) -> Tensor:
    """Codes of the least error of the outputs that two searches on the same params find, row by row."""
    format, parts = present.format, []
    for first in range(0, max(len(target), 1), ROWS):
        rows = target[first : first + ROWS]
        fixed = plain_rows(present.params, first, first + ROWS, len(target))
        walked = Columns((len(rows), target.shape[1]), hessian.diagonal(), format, False, fixed)
        walked.feed_back(rows, feedback, None)
        stayed = Columns((len(rows), target.shape[1]), hessian.diagonal(), format, False, fixed)
        stayed.codes = present.codes[first : first + ROWS].clone()
        for solver in (walked, stayed):
            _descend(solver, rows, hessian)
        lost = [_lost(rows, QuantizedTensor(format, rows.shape, s.codes, fixed), hessian) for s in (walked, stayed)]
        parts.append(torch.where((lost[1] <= lost[0])[:, None], stayed.codes, walked.codes))
    return torch.cat(parts)


def _moved(target: Tensor, start: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Scales and codes by turns, from a start; params that are quantized themselves stay."""
    format = start.format
    if set(_movable(start)) != set(format.continuous) or format.vector_size > 1:
        return start
    params = {name: value for name, value in start.params.items() if isinstance(value, Tensor)}
    codes = start.codes
    for _ in range(TURNS):
        params = refit_scales(target, codes, params, format, hessian)
        solver = Columns((len(target), target.shape[1]), hessian.diagonal(), format, False, params)
        solver.codes = codes.clone()
        _descend(solver, target, hessian)
        codes = solver.codes
    return QuantizedTensor(format, start.shape, codes, refit_scales(target, codes, params, format, hessian))


def _descend(solver: Columns, rows: Tensor, hessian: Tensor) -> None:
    for _ in range(SWEEPS if solver.format.vector_size == 1 else 0):
        solver.descend(rows, hessian)


def _with_codes(present: QuantizedTensor, codes: Tensor) -> QuantizedTensor:
    return QuantizedTensor(present.format, present.shape, codes, present.params)


def _lost(target: Tensor, near: QuantizedTensor, hessian: Tensor) -> Tensor:
    """The squared error of each row's outputs."""
    return energy(target.to(torch.float64) - near.dequantize(), hessian)
