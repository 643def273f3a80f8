"""GPTQ: round the columns one after the other, each making up for the errors of those before it.

Frantar et al. 2023, "GPTQ: accurate post-training quantization", in the Cholesky form. With X (tokens, in) the
inputs of W (out, in), H = X^T X + damping (in, in) and U^T U = H^-1, U upper triangular, it lessens
tr((W - Q) H (W - Q)^T):

    q_j = decode(encode(w_j)),   w_k <- w_k - (w_j - q_j) U_jk / U_jj   for all columns k > j

Params are fitted to a group when the walk reaches it, on weights that hold all earlier corrections; up front where
the walk is out of order, where groups cross rows, and where params are quantized themselves (double quantization:
the codes then answer to the params as stored). Options go further under the same loss: `sweeps` of coordinate
descent, each code moved to its best value given all others, w_j + sum_{k != j} (W - Q)_k H_kj / H_jj; and `refit`,
each scale moved to its best value given all codes and the other scales.

`asymmetric` is GPTAQ (Li et al. 2025): the inputs X of the quantized model so far are not those X~ of the model as it
was, and what should be met is W X~. When column j is fixed, the columns F that are still free make up for what its
inputs drifted: ||(dW)_F X_F - w_j (X~ - X)_j||^2 is least at w_j D_jF H_FF^-1, D = (X~ - X)^T X. H_FF^-1 is
U_FF^T U_FF, so all of it together is W P, P = R U, R the strict upper triangle of D U^T: the same walk, sweeps and
refit, towards W + a W P for a share a. (w_j is the weight as it was, whose outputs are to be met; the paper takes it
with the walk's corrections.) Damping, in H_FF, is the ridge of these regressions. The whole regression, which is least
for ||Q X - W X~||^2, has fixed columns and column j itself make up for j too. On a 135M model either ruins at a = 1
what this betters at a = 0.25, the share in the authors' code.

Bytes beside W (m, n) and H: 8 n^2 of U and 4 n^2 more while it is made, then 16 n of each row that is walked, ROWS at
a time; `sweeps` and `refit` take 8 n^2 more, act-order 8 n^2 while U is made, `asymmetric` 20 n^2 while R is made and
16 m n while W P is, of which 8 m n stay. At n = 14336 U is 1.6 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import CalibrationError, RecipeError
from whit.methods.columns import Columns, fit_params, plain_rows
from whit.methods.feedback import damped, damped_diagonal, factored
from whit.methods.scales import refit_scales
from whit.named import INF, check_options
from whit.tensor import Format, LayerStats, Params, QuantizedTensor

ROWS = 8192  # solved at a time; fixed, so that results do not depend on the machine


@dataclass(frozen=True)
class GPTQ:
    """GPTQ (Frantar et al. 2023): column by column, the error of each made up for by the columns after it; for any
    format.

    - `damp`: the share of the hessian's mean diagonal that is added to it.
    - `act_order`: columns by decreasing activation. Groups stay those of the original order, so files need no
      permutation.
    - `clip`: search each group's range, with squared errors weighted by the hessian's diagonal.
    - `refit`: refine the scales after the codes; params that are quantized themselves stay.
    - `sweeps`: passes of coordinate descent over the codes.
    - `asymmetric`: GPTAQ, how much of the drift of the inputs is made up for: 0 for none; 0.25 is good, 1 can ruin a
      model.

    What each gains: benchmarks/results/gptq_options.md and gptq_options_smollm2.md. RecipeError for options that are
    out of their bounds.
    """

    damp: float = 0.01
    act_order: bool = False
    clip: bool = True
    refit: bool = False
    sweeps: int = 0
    asymmetric: float = 0.0

    name: ClassVar[str] = "gptq"
    needs_stats: ClassVar[bool] = True

    @property
    def needs_exact(self) -> bool:
        return self.asymmetric > 0

    def __post_init__(self) -> None:
        check_options(self, damp=(0, INF), sweeps=(0, INF), asymmetric=(0, INF))

    def __call__(self, weight: Tensor, stats: LayerStats | None, format: Format) -> QuantizedTensor:
        """Quantize (out, in) for the inputs that `stats` describes; CalibrationError where they are not its own."""
        hessian = _checked(stats, weight)
        if self.sweeps and format.vector_size > 1:
            raise RecipeError(f"gptq: sweeps with {format}; its codes must be one column wide; set sweeps = 0")
        order = _by_activation(hessian, format.vector_size) if self.act_order else None
        factor, shares = factored(hessian, self.damp, order)
        if self.asymmetric and stats is not None and stats.drift is not None:  # of what experts see there are no pairs
            shift = _made_up_for(weight, stats.drift, factor, order, format.vector_size)
            weight = weight + self.asymmetric * shift
        feedback = factor.div_(factor.diagonal()[:, None].clone())
        importance = damped_diagonal(hessian, shares)
        sealed = self._params_up_front(weight, importance, format)
        movable = self.refit and not _is_nested(format)
        if self.sweeps or movable:
            hessian = damped(hessian, shares)
        step = ROWS if format.row_independent else max(len(weight), 1)
        done = []
        for first in range(0, max(len(weight), 1), step):
            rows = weight[first : first + step]
            params = None if sealed is None else plain_rows(sealed, first, first + step, len(weight))
            solver = Columns((len(rows), weight.shape[1]), importance, format, self.clip, params)
            solver.feed_back(rows, feedback, order)
            for _ in range(self.sweeps):
                solver.descend(rows, hessian)
            if movable:
                solver.params = refit_scales(rows, solver.codes, solver.params, format, hessian)
            done.append(solver)
        codes = torch.cat([solver.codes for solver in done])
        if sealed is None or movable:
            sealed = {name: torch.cat([solver.params[name] for solver in done]) for name in done[0].params}
        return QuantizedTensor(format, tuple(weight.shape), codes, format.seal(sealed))

    def _params_up_front(self, weight: Tensor, importance: Tensor, format: Format) -> Params | None:
        """The params as stored, None where each group's are fitted when the walk reaches it."""
        if format.row_independent and not self.act_order and not _is_nested(format):
            return None
        return format.seal(fit_params(weight, importance, format, self.clip))


def _made_up_for(weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor | None, vector_size: int) -> Tensor:
    """W P (out, in) in float64: what later columns take over of each one's drift. `factor` is U, columns in `order`."""
    columns = torch.arange(len(factor), device=factor.device) if order is None else order
    moment = drift[columns[:, None], columns].to(torch.float64) @ factor.T
    moment.triu_(diagonal=1)
    if vector_size > 1:  # columns that are coded jointly are fixed at the same time
        vectors = columns // vector_size
        moment.masked_fill_(vectors[:, None] == vectors, 0)
    shift = weight[:, columns].to(torch.float64) @ moment @ factor
    return shift if order is None else shift[:, order.argsort()]


def _is_nested(format: Format) -> bool:
    """Whether params of the format are quantized themselves."""
    return any(spec.format is not None for spec in format.param_specs(1, 1).values())


def _by_activation(hessian: Tensor, vector_size: int) -> Tensor:
    """Columns (n,) by decreasing diagonal, those that are coded jointly kept together."""
    size = torch.nn.functional.pad(hessian.diagonal(), (0, -len(hessian) % vector_size))
    vectors = size.reshape(-1, vector_size).sum(dim=1).argsort(descending=True, stable=True)
    columns = (vectors[:, None] * vector_size + torch.arange(vector_size, device=vectors.device)).flatten()
    return columns[columns < len(hessian)]


def _checked(stats: LayerStats | None, weight: Tensor) -> Tensor:
    if stats is None or not stats.token_count:
        raise CalibrationError("gptq: no token reached this weight; its statistics must hold some; calibrate the model")
    if stats.hessian.shape != (weight.shape[1], weight.shape[1]):
        raise CalibrationError(
            f"gptq: hessian {list(stats.hessian.shape)} for a weight {list(weight.shape)}; "
            "it must be square in the weight's columns; give the statistics of this linear"
        )
    return stats.hessian
