"""HQQ: half-quadratic quantization (Badri and Shaji 2023), robust to outliers and without data.

It minimises sum |W - W^|^p, p < 1, by splitting: with auxiliary errors E, repeat

    E     <- shrink(W - W^),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)    (the generalised soft threshold)
    param <- argmin || (W - E) - W^ ||^2 with the codes held,   then W^ <- decode(encode(W))
    beta  <- kappa beta

The param that moves is the zero point where it is a float (the paper's case: Z = mean(Q - (W - E) / S)), and the
scale or absmax in other formats. Errors are measured in units of the row's root mean square error, so that beta
means the same whatever the magnitude of the weights (the paper's beta = 10 is for raw weights, where the threshold
swallows nearly every error); each group keeps its best params in mean absolute error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.methods.rows import select, solve_by_rows
from whit.named import INF, check_options
from whit.tensor import Format, LayerStats, Params, QuantizedTensor


@dataclass(frozen=True)
class HQQ:
    """Half-quadratic quantization (Badri and Shaji 2023); needs no data.

    - `p`: the norm of the error, from 0 to 1.
    - `beta`: the penalty, above 0, in units of a row's root mean square error; `kappa`: its growth, 1 or more.
    - `iterations`: at most so many.

    RecipeError for options that are out of these bounds.
    """

    p: float = 0.7
    beta: float = 1.0
    kappa: float = 1.01
    iterations: int = 20

    name: ClassVar[str] = "hqq"
    needs_stats: ClassVar[bool] = False
    needs_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, p=(0, 1), beta=(1e-6, INF), kappa=(1, INF), iterations=(1, INF))

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        return solve_by_rows(self.solve, weight, format)

    def solve(self, weight: Tensor, format: Format) -> tuple[Tensor, Params]:
        """Codes and unsealed params of some rows."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        free = ("zero_point",) if "zero_point" in format.continuous else format.continuous
        params = best = format.fit(weight)
        codes = format.encode(weight, params)
        error = weight - format.decode(codes, params)
        least = format.sums(error.abs())
        beta = self.beta
        for _ in range(self.iterations if free else 0):
            params = format.refit(weight - self.shrink(error, beta), codes, params, free)
            codes = format.encode(weight, params)
            error = weight - format.decode(codes, params)
            size = format.sums(error.abs())
            better = size < least
            if not bool(better.any()):
                break
            best, least = select(better, params, best), torch.where(better, size, least)
            beta *= self.kappa
        return format.encode(weight, best), best

    def shrink(self, error: Tensor, beta: float) -> Tensor:
        """The proximal operator of |x|^p / beta: large errors are kept as outliers, small ones go to zero."""
        unit = error.square().mean(dim=1, keepdim=True).sqrt_().clamp_(min=torch.finfo(error.dtype).tiny)
        size = error.abs() / unit
        threshold = size.clamp(min=1e-6).pow_(self.p - 1).mul_(1 / beta)
        return size.sub_(threshold).clamp_(min=0).mul_(unit).copysign_(error)
