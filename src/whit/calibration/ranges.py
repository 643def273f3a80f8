"""Static ranges of what linears are given: one scale, and perhaps one zero point, for each, chosen on a text.

All values go into a histogram whose limits are powers of two, so that it does not depend on the order in which they
came; the range [low, high] that is then chosen is

- minmax: the smallest and the largest value;
- moving: their averages over samples, low <- low + momentum (min of the sample - low) (as QAT tracks them);
- percentile: within it lie so many percent of |x|, or of x on either side;
- mse: what lies in [-c, c], with the least sum of squared errors of rounding and clipping;
- entropy: the same with the least KL divergence of the quantized distribution from the clipped one (TensorRT's way).

c takes the values max|x| 2^(-i/16), i = 0 ... 128.

Columns that stay exact are those with the largest |x|; what is left has a low end where that is nearer to 0 than the
high one by ONE_SIDED.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.activations import LARGEST, Activations
from whit.calibration.capture import Products
from whit.errors import CalibrationError
from whit.rotation import rotate

BINS = 1 << 14
STEPS, LAST = 16, 128
ONE_SIDED = 4.0


@dataclass(eq=False)
class Histogram:
    """Counts int64 (BINS,) of values in [-limit, limit), limit a power of two, and the extremes of all values.

    `ends` float32 (2, columns): the extremes of each column.
    """

    momentum: float
    counts: Tensor | None = None
    limit: float = 0.0
    low: float = 0.0
    high: float = 0.0
    moving: tuple[float, float] = (0.0, 0.0)
    ends: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """All values of a sample. CalibrationError where one of them is not finite."""
        values = x.reshape(-1).to(torch.float32)
        low, high = (float(v) for v in torch.aminmax(values))
        if not (abs(low) < torch.inf and abs(high) < torch.inf):  # a NaN fails too
            raise CalibrationError(
                "activations: a linear was given values that are not finite; they must be; calibrate in float32"
            )
        first, (before, after), step = self.counts is None, self.moving, self.momentum
        self.moving = (low, high) if first else (before + step * (low - before), after + step * (high - after))
        self.low, self.high = (low, high) if first else (min(self.low, low), max(self.high, high))
        self._widen(max(-low, high))
        assert self.counts is not None
        if x.dim() > 1:
            self._see_columns(x.reshape(-1, x.shape[-1]).to(torch.float32))
        index = (values * (BINS / 2 / self.limit)).floor().long() + BINS // 2  # exact: a product with a power of two
        self.counts += torch.bincount(index, minlength=BINS).cpu()

    def _see_columns(self, rows: Tensor) -> None:
        lows, highs = torch.aminmax(rows, dim=0)
        if self.ends is not None:
            lows, highs = lows.minimum(self.ends[0]), highs.maximum(self.ends[1])
        self.ends = torch.stack([lows, highs])

    def _widen(self, size: float) -> None:
        """Make the limit exceed `size`; two bins become one with every doubling."""
        if self.counts is None:
            self.counts, self.limit = torch.zeros(BINS, dtype=torch.int64), 2.0**-40
        while self.limit <= size:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([pairs.new_zeros(BINS // 4), pairs, pairs.new_zeros(BINS // 4)])
            self.limit *= 2

    @property
    def centers(self) -> Tensor:
        """The middle of every bin, float64 (BINS,)."""
        return ((torch.arange(BINS, dtype=torch.float64) + 0.5) / (BINS / 2) - 1) * self.limit


class RangeWatch(Products):
    """A histogram of the inputs of each watched parameter, while it is entered; the same one for the same input.

    `turns` says by name how many columns are rotated together before they are quantized, where they are.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], momentum: float, turns: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(parameters)
        self._turns = turns or {}
        self.found = {name: Histogram(momentum) for name in parameters}
        self._last: tuple[Tensor, str] | None = None  # kept, so that its memory is not used again

    def _see(self, name: str, x: Tensor, weight: Tensor) -> None:
        turn = self._turns.get(name, 0)
        before, other = self._last or (None, name)
        if before is not None and other != name and _place(before) == _place(x) and self._turns.get(other, 0) == turn:
            self.found[name] = self.found[other]
            return
        self._last = x, name
        self.found[name].add(rotate(x.to(torch.float32), turn) if turn else x)


def _place(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), x._version, *x.shape, *x.stride()


def input_tensors(found: Histogram, how: Activations) -> dict[str, Tensor]:
    """What `how.specs` names, for a linear whose inputs were seen.

    `input_scale` float32 (1,) and, asymmetric, `input_zero_point` int8 (1,); `input_columns` int32 (exact,) in
    ascending order and `input_low` float32 (1,) where columns stay exact.
    """
    if found.counts is None or (how.exact and found.ends is None):
        raise CalibrationError(
            "activations: no token reached a linear that is to have a static scale or exact columns; one must; use "
            "another text, or dynamic ones"
        )
    if how.exact:
        assert found.ends is not None
        return _exact_columns(found.ends.cpu(), how.exact)
    scale, zero = _scale(*_range(found, how), how)
    tensors = {"input_scale": torch.tensor([scale], dtype=torch.float32)}
    return tensors if how.symmetric else {**tensors, "input_zero_point": torch.tensor([zero], dtype=torch.int8)}


def _exact_columns(ends: Tensor, count: int) -> dict[str, Tensor]:
    """Of columns with these ends (2, columns)."""
    if count >= ends.shape[1]:
        raise CalibrationError(
            f"activations: {count} exact columns of {ends.shape[1]}; fewer must be, to quantize the others; use less"
        )
    columns = ends.abs().amax(dim=0).argsort(descending=True, stable=True)[:count].sort().values
    left = ends.index_fill(1, columns, 0.0)
    low, high = min(float(left[0].min()), 0.0), float(left[1].max())
    found = low if high > -ONE_SIDED * low else -torch.inf
    return {"input_columns": columns.to(torch.int32), "input_low": torch.tensor([found], dtype=torch.float32)}


def _range(found: Histogram, how: Activations) -> tuple[float, float]:
    if how.range == "minmax":
        return found.low, found.high
    if how.range == "moving":
        return found.moving
    if how.range == "percentile":
        return _percentile(found, how.percentile / 100, how.symmetric)
    costs = {"mse": _squared_error, "entropy": _divergence}[how.range]
    size = max(-found.low, found.high)
    sizes = [size * 2.0 ** (-i / STEPS) for i in range(LAST + 1)]
    tried = [(-c, c) if how.symmetric else (max(-c, found.low), min(c, found.high)) for c in sizes]
    return min(tried, key=lambda ends: costs(found, ends, how))


def _percentile(found: Histogram, share: float, symmetric: bool) -> tuple[float, float]:
    """The outer edges of the bins within which that share lies, and no more than all values."""
    assert found.counts is not None
    width = found.limit / (BINS // 2)
    if symmetric:
        sizes = found.counts[BINS // 2 :] + found.counts[: BINS // 2].flip(0)
        size = min((_reached(sizes, share) + 1) * width, max(-found.low, found.high))
        return -size, size
    low = (_reached(found.counts.flip(0), share) + 1) * width - found.limit
    high = (_reached(found.counts, share) + 1) * width - found.limit
    return max(-low, found.low), min(high, found.high)


def _reached(counts: Tensor, share: float) -> int:
    """The first bin up to which that share of all lies."""
    total = counts.cumsum(0)
    return int(torch.searchsorted(total.double(), share * float(total[-1])).clamp(max=len(counts) - 1))


def _scale(low: float, high: float, how: Activations) -> tuple[float, int]:
    """The scale and zero point of a range, which is widened to hold 0; scale 1 where it is 0."""
    largest = LARGEST[how.dtype]
    if how.symmetric:
        return max(-low, high) / largest or 1.0, 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2 * largest + 1) or 1.0
    return scale, max(-128, min(127, round(-128 - low / scale)))


def _fake(values: Tensor, ends: tuple[float, float], how: Activations) -> Tensor:
    """Values as a static range makes them."""
    scale, zero = _scale(*ends, how)
    if how.dtype != torch.int8:
        largest = LARGEST[how.dtype]
        return (values / scale).clamp(-largest, largest).float().to(how.dtype).double() * scale
    return ((values / scale).round() + zero).clamp(-128, 127).sub(zero) * scale


def _squared_error(found: Histogram, ends: tuple[float, float], how: Activations) -> float:
    assert found.counts is not None
    return float((found.counts * (_fake(found.centers, ends, how) - found.centers).square()).sum())


def _divergence(found: Histogram, ends: tuple[float, float], how: Activations) -> float:
    """KL(P || Q): P clipped to the range, Q the mass of each level spread over its bins that are not empty."""
    assert found.counts is not None
    centers = found.centers
    inside = (centers >= min(ends[0], 0.0)) & (centers <= max(ends[1], 0.0))
    kept = torch.where(inside, found.counts, 0).double()
    if not float(kept.sum()) > 0:
        return torch.inf
    _, level = torch.unique_consecutive(_fake(centers, ends, how), return_inverse=True)
    filled = (kept > 0).double()
    mass = torch.zeros(int(level.max()) + 1, dtype=torch.float64).index_add_(0, level, kept)
    bins = torch.zeros_like(mass).index_add_(0, level, filled)
    spread = filled * (mass / bins.clamp(min=1))[level]
    clipped = kept.clone()
    edges = inside.nonzero().flatten()
    clipped[edges[0]] += found.counts[: edges[0]].sum()
    clipped[edges[-1]] += found.counts[edges[-1] + 1 :].sum()
    p, q = clipped / clipped.sum(), spread / spread.sum()
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())
