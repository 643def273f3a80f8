"""Params of ggml types with the least squared error: a search per run of columns, then per superblock.

Values of a run are x_i, weights w_i (the importance of the columns, or 1). For given codes with levels q_i the best
scale and offset of x ~ s q - o solve a least squares problem, in closed form:

    s = (S_w S_xq - S_x S_q) / (S_w S_qq - S_q^2),   o = (s S_q - S_x) / S_w,   S_ab = sum_i w_i a_i b_i

so steps are tried from slightly larger to smaller than the one that just reaches the largest value, and the best kept
(as ggml's own quantizer does). What follows goes beyond it: d and dmin in float16 and the integer sub-scales are
chosen by the error as stored: each sub-scale tries its neighbours with the best minimum for each, then d and dmin are
solved for given all codes and sub-scales, for as many rounds as it pays.

Everything is elementwise but for sums by halves (`total`), so that no result depends on threads, nor on which rows
are fitted together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.formats.ggml.kinds import Kind
from whit.formats.ggml.levels import nearest_level
from whit.formats.ggml.runs import Runs, fold
from whit.formats.ggml.superblocks import fit_superblocks
from whit.formats.numeric import check_fits

ROWS = 512  # rows fitted together, innermost in memory, so that all arithmetic is along contiguous rows
CHUNK = 1 << 17  # weights fitted together: the few copies of them that are needed stay in a processor's cache
ALIKE = 1e-5  # where the codes of a run vary by no more than this share of their square, they say nothing of an offset
FLOOR = 1e-6  # of the largest importance: columns that no token excited count this much


def fit_groups(weight: Tensor, importance: Tensor | None, kind: Kind, name: str) -> dict[str, Tensor]:
    """Params of a float matrix (rows, columns) in the shapes of `Ggml.param_specs`; FormatError beyond float16."""
    rows, columns = weight.shape
    groups = max(-(-columns // kind.group_size), 1)
    padded, weights = _padded(weight, importance, groups * kind.group_size)
    step = min(max(rows, 1), ROWS)
    wide = max(CHUNK // (step * kind.group_size), 1)
    parts: list[dict[str, Tensor]] = []
    for first in range(0, max(rows, 1), step):
        line = []
        for group in range(0, groups, wide):
            area = slice(group * kind.group_size, (group + wide) * kind.group_size)
            x = padded[first : first + step, area].to(torch.float32).T
            x = x.reshape(-1, kind.sub_size, x.shape[1]).contiguous()
            w = None if weights is None else weights[area].reshape(-1, kind.sub_size, 1)
            line.append(_fit(Runs(x, w), kind, name))
        parts.append({key: torch.cat([part[key] for part in line]).T for key in line[0]})
    return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}


def _padded(weight: Tensor, importance: Tensor | None, columns: int) -> tuple[Tensor, Tensor | None]:
    """The matrix with whole groups, and weights (columns,) that do not count what was added; None: all count alike."""
    rows, present = weight.shape
    weights = None
    if importance is not None:
        weights = importance.to(torch.float32)
        weights = weights / weights.max().clamp(min=torch.finfo(torch.float32).tiny)
        weights = weights.clamp(min=FLOOR)
    if missing := columns - present:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], dim=1)
        real = torch.ones(present, device=weight.device) if weights is None else weights
        weights = torch.cat([real, real.new_full((missing,), FLOOR * FLOOR)])
    return weight, weights


def _fit(runs: Runs, kind: Kind, name: str) -> dict[str, Tensor]:
    """Params with leading dimension groups (or runs) and trailing dimension rows."""
    if kind.exponent:
        return {"exponent": _exponents(runs, kind)}
    if kind.scale_bits:
        scale, offset = lines(runs, kind) if kind.offset else (slopes(runs, kind), None)
        return fit_superblocks(runs, kind, scale, offset, name)
    if kind.offset:
        return _offset_pairs(runs, kind, name)
    return _single_scales(runs, kind, name)


def slopes(runs: Runs, kind: Kind) -> Tensor:
    """The real scale s (runs, rows) with the least error of x ~ s q."""
    bottom = float(min(kind.levels, default=kind.low))
    unit = bottom / torch.where(runs.extreme == 0, bottom, runs.extreme)
    most, best = torch.zeros_like(unit), torch.zeros_like(unit)
    start, stop, count = kind.stretch
    for share in torch.linspace(start, stop, count, dtype=torch.float64).tolist():
        q = nearest_level(runs.x * (unit * (1 + share))[:, None], kind)
        weighted = runs.weigh(q)
        xq, qq = fold(weighted * runs.x), fold(weighted.mul_(q))
        scale = xq / qq.clamp_(min=1e-30)
        gain = xq * scale
        better = gain > most
        most, best = torch.where(better, gain, most), torch.where(better, scale, best)
    return best


def lines(runs: Runs, kind: Kind) -> tuple[Tensor, Tensor]:
    """The real scale and offset (runs, rows) with the least error of x ~ s q - o; sub-minima have o >= 0."""
    signed = kind.offset == "m"
    low = runs.low if signed else runs.low.clamp(max=0)
    width = runs.high - low
    reach = torch.where(width > 0, kind.high / width.clamp(min=1e-30), 0.0)
    shifted = runs.x - low[:, None]
    least = torch.full_like(low, torch.inf)
    best, offset = torch.zeros_like(low), -low
    start, stop, count = kind.stretch
    for share in torch.linspace(start, stop, count, dtype=torch.float64).tolist():
        q = nearest_level(shifted * (reach * (1 + share))[:, None], kind)
        weighted = runs.weigh(q)
        s_q, s_xq, s_qq = fold(weighted), fold(weighted * runs.x), fold(weighted.mul_(q))
        determinant = runs.count * s_qq - s_q * s_q
        solvable = determinant > ALIKE * runs.count * s_qq
        s = (runs.count * s_xq - runs.sum * s_q) / determinant.clamp(min=1e-30)
        o = (s * s_q - runs.sum) / runs.count
        if not signed:
            through_zero = (o < 0) | (~solvable & (low == 0))
            o = torch.where(through_zero, 0.0, o)
            s = torch.where(through_zero, s_xq / s_qq.clamp(min=1e-30), s)
            solvable |= through_zero
        error = s * (s * s_qq - 2 * s_xq) + o * (o * runs.count + 2 * (runs.sum - s * s_q))
        better = (error < least) & (s > 0) & solvable
        least = torch.where(better, error, least)
        best, offset = torch.where(better, s, best), torch.where(better, o, offset)
    return best, offset


def _single_scales(runs: Runs, kind: Kind, name: str) -> dict[str, Tensor]:
    """d of types without sub-scales: the best as rounded to float16, among the search's and the largest value's own."""
    bottom = float(min(kind.levels, default=kind.low))
    own = runs.extreme / (bottom if bottom != -128 else -127)
    best = stored_scale(slopes(runs, kind), f"{name}: d")
    least, _ = runs.error(best, None, kind)
    candidate = own.to(torch.float16).to(torch.float32)
    for _ in range(3):
        error, q = runs.error(candidate, None, kind)
        better = (error < least) & torch.isfinite(candidate)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
        _, q = runs.error(best, None, kind)
        weighted = runs.weigh(q)
        refined = fold(weighted * runs.x) / fold(weighted.mul_(q)).clamp_(min=1e-30)
        candidate = torch.where(refined == 0, best, refined).to(torch.float16).to(torch.float32)
    return {"d": best.to(torch.float16)}


def _offset_pairs(runs: Runs, kind: Kind, name: str) -> dict[str, Tensor]:
    """d and m of q4_1 and q5_1."""
    scale, offset = lines(runs, kind)
    best, low = stored_scale(scale, f"{name}: d"), -offset
    check_fits(low.abs(), torch.float16, f"{name}: m")
    low = low.to(torch.float16).to(torch.float32)
    least, _ = runs.error(best, -low, kind)
    d, m = ((runs.high - runs.low) / kind.high), runs.low
    for _ in range(3):
        d, m = d.to(torch.float16).to(torch.float32), m.to(torch.float16).to(torch.float32)
        error, q = runs.error(d, -m, kind)
        better = (error < least) & torch.isfinite(d) & torch.isfinite(m)
        best, low = torch.where(better, d, best), torch.where(better, m, low)
        least = torch.where(better, error, least)
        _, q = runs.error(best, -low, kind)
        weighted = runs.weigh(q)
        s_q, s_xq, s_qq = fold(weighted), fold(weighted * runs.x), fold(weighted.mul_(q))
        determinant = runs.count * s_qq - s_q * s_q
        d = torch.where(determinant > 0, (runs.count * s_xq - runs.sum * s_q) / determinant.clamp(min=1e-30), best)
        d = d.to(torch.float16).to(torch.float32)
        m = (runs.sum - d * s_q) / runs.count
    return {"d": best.to(torch.float16), "m": low.to(torch.float16)}


def stored_scale(scale: Tensor, where: str) -> Tensor:
    """Rounded to float16, as float32; what is not zero stays so."""
    check_fits(scale.abs(), torch.float16, where)
    smallest = 2.0**-24
    kept = torch.where(scale == 0, 0.0, torch.sign(scale) * scale.abs().clamp(min=smallest))
    return kept.to(torch.float16).to(torch.float32)


def exponent_scale(exponent: Tensor) -> Tensor:
    """Half of the power of two that an E8M0 byte stands for: 2^(e - 128), in float32."""
    e = exponent.to(torch.int32)
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def _exponents(runs: Runs, kind: Kind) -> Tensor:
    """The best of the powers of two around the one that the largest value suggests."""
    largest = runs.extreme.abs()
    base = torch.frexp(largest).exponent - 1 - 2 + 127  # floor(log2) - 2, biased
    best = torch.where(largest > 0, base, 0).clamp(0, 254).to(torch.uint8)
    least, _ = runs.error(exponent_scale(best), None, kind)
    for change in (1, -1):
        candidate = (base + change).clamp(0, 254).to(torch.uint8)
        error, _ = runs.error(exponent_scale(candidate), None, kind)
        better = (error < least) & (largest > 0)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best
