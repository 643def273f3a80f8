"""Superblocks: float16 d (and dmin) with integer sub-scales (and sub-minima), chosen by the error as stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whit.formats.ggml.kinds import Kind
from whit.formats.ggml.runs import Runs, fold
from whit.formats.numeric import check_fits

ROUNDS = 2
SMALLEST = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class _Super:
    """A state of the search: d, dmin (groups, 1, rows), integers scale, least (groups, runs, rows), all float32."""

    d: Tensor
    scale: Tensor
    dmin: Tensor | None = None
    least: Tensor | None = None

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """s and o (groups * runs, rows)."""
        s = (self.d * self.scale).flatten(0, 1)
        return s, None if self.dmin is None or self.least is None else (self.dmin * self.least).flatten(0, 1)


def fit_superblocks(runs: Runs, kind: Kind, scale: Tensor, offset: Tensor | None, name: str) -> dict[str, Tensor]:
    """Params from the real scale and offset (groups * runs, rows) of every run."""
    state = _start(kind, scale, offset, name)
    error = _error(runs, kind, state)
    for _ in range(ROUNDS):
        state, error = _polish(runs, kind, state, error)
        state, error = _solve(runs, kind, state, error)
    params = {"d": state.d[:, 0].to(torch.float16), "scale": _integers(state.scale + kind.scale_bias)}
    if state.dmin is not None and state.least is not None:
        params |= {"dmin": state.dmin[:, 0].to(torch.float16), "min": _integers(state.least)}
    return params


def _integers(values: Tensor) -> Tensor:
    return values.flatten(0, 1).to(torch.uint8)


def _by_group(values: Tensor, kind: Kind) -> Tensor:
    """(groups * runs, rows) to (groups, runs, rows)."""
    return values.reshape(-1, kind.subs, values.shape[-1])


def _limits(kind: Kind) -> tuple[float, float]:
    return -kind.scale_bias, (1 << kind.scale_bits) - 1 - kind.scale_bias


def _start(kind: Kind, scale: Tensor, offset: Tensor | None, name: str) -> _Super:
    lowest, highest = _limits(kind)
    s = _by_group(scale, kind)
    high, low = s.amax(dim=1, keepdim=True), s.amin(dim=1, keepdim=True)
    extreme = torch.where(-low > high, low, high)
    d = _stored(extreme / (lowest or highest), f"{name}: d")
    if offset is None:
        return _Super(d, _rounded(s, d, lowest, highest))
    o = _by_group(offset, kind)
    dmin = _stored(o.amax(dim=1, keepdim=True) / highest, f"{name}: dmin")
    return _Super(d, _rounded(s, d, lowest, highest), dmin, _rounded(o, dmin, 0, highest))


def _stored(value: Tensor, where: str) -> Tensor:
    check_fits(value.abs(), torch.float16, where)
    kept = torch.where(value == 0, 0.0, torch.sign(value) * value.abs().clamp(min=SMALLEST))
    return kept.to(torch.float16).to(torch.float32)


def _rounded(value: Tensor, unit: Tensor, low: float, high: float) -> Tensor:
    return torch.where(unit == 0, 0.0, value / unit).round_().clamp_(low, high)


def _error(runs: Runs, kind: Kind, state: _Super) -> Tensor:
    """(groups, runs, rows)"""
    error, _ = runs.error(*state.effective(), kind)
    return _by_group(error, kind)


def _polish(runs: Runs, kind: Kind, state: _Super, error: Tensor) -> tuple[_Super, Tensor]:
    """Each sub-scale tries its neighbours, each with the minimum that is best for it."""
    lowest, highest = _limits(kind)
    best = state
    for change in (0, 1, -1):
        trial = replace(state, scale=(state.scale + change).clamp_(lowest, highest))
        if state.dmin is not None:
            s, o = trial.effective()
            _, q = runs.error(s, o, kind)
            wanted = (s * runs.total(q) - runs.sum) / runs.count
            trial = replace(trial, least=_rounded(_by_group(wanted, kind), state.dmin, 0, highest))
        elif not change:
            continue
        found = _error(runs, kind, trial)
        better = found < error
        error = torch.where(better, found, error)
        best = replace(best, scale=torch.where(better, trial.scale, best.scale))
        if trial.least is not None and best.least is not None:
            best = replace(best, least=torch.where(better, trial.least, best.least))
    return best, error


def _solve(runs: Runs, kind: Kind, state: _Super, error: Tensor) -> tuple[_Super, Tensor]:
    """d and dmin with the least error for the codes, sub-scales and sub-minima as they are."""

    def whole(values: Tensor) -> Tensor:
        return fold(values)[:, None]

    def parts(values: Tensor) -> Tensor:
        return _by_group(values, kind)

    _, q = runs.error(*state.effective(), kind)
    weighted = runs.weigh(q)
    if state.dmin is not None:
        s_q = parts(fold(weighted))
    s_xq, s_qq = parts(fold(weighted * runs.x)), parts(fold(weighted.mul_(q)))
    dd, dx = whole(state.scale * state.scale * s_qq), whole(state.scale * s_xq)
    if state.dmin is None or state.least is None:
        trial = replace(state, d=_near(dx / dd.clamp(min=1e-30), state.d))
    else:
        count, total = parts(runs.count.expand(len(q), q.shape[2])), parts(runs.sum)
        dm, mm = whole(state.scale * state.least * s_q), whole(state.least * state.least * count)
        mx = whole(state.least * total)
        determinant = dd * mm - dm * dm
        regular = determinant > 1e-6 * dd * mm
        safe = torch.where(regular, determinant, 1.0)
        d = torch.where(regular, (dx * mm - dm * mx) / safe, (dx + state.dmin * dm) / dd.clamp(min=1e-30))
        dmin = torch.where(regular, (dm * dx - dd * mx) / safe, state.dmin)
        trial = replace(state, d=_near(d, state.d), dmin=_near(dmin, state.dmin))
    found = _error(runs, kind, trial)
    better = whole(found) < whole(error)
    chosen = replace(state, d=torch.where(better, trial.d, state.d))
    if trial.dmin is not None and state.dmin is not None:
        chosen = replace(chosen, dmin=torch.where(better, trial.dmin, state.dmin))
    return chosen, torch.where(better, found, error)


def _near(value: Tensor, old: Tensor) -> Tensor:
    """Rounded to float16 where that is a finite number of the same sign, else the old one."""
    stored = value.to(torch.float16).to(torch.float32)
    return torch.where(torch.isfinite(stored) & (stored * old > 0), stored, old)
