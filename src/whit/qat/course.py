"""How a model is trained: the options of an end-to-end run, and recipes of the literature."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from whit.errors import RecipeError
from whit.methods.blocks import UNITS
from whit.named import INF, check_options

BOUNDS = {
    **dict.fromkeys(("steps", "batch", "at_once"), (1, INF)),
    **dict.fromkeys(("rate", "scale_rate", "kept_rate", "distill", "text", "hidden", "clip", "seconds"), (0, INF)),
    **dict.fromkeys(("warmup", "floor", "slow", "inside"), (0, 1)),
}


@dataclass(frozen=True)
class Course:
    """The hyper-parameters of end-to-end training: `steps` of AdamW on `batch` windows each.

    - `rate` is for weights, `scale_rate` for params, `kept_rate` for what is not quantized (0: it stays). Rates are
      counted in steps of the format and in the size of a row or, with `units` "plain", in the values' own units. They
      rise over the share `warmup` of the steps and fall along a cosine to `floor` of themselves.
    - `slow`: the decay of AdamW's second average. `clip`: the largest norm of the gradient (0: no limit).
    - `distill`, `text`, `hidden`: the weights of the losses (`losses.py`).
    - `inside`: where in its cell each weight begins (`methods.latent`); 1: at the unquantized weight.
    - `fitted`: params are not learned; the format fits them to the weights in every step.
    - `at_once`: so many windows are run together; on a CPU each alone.
    - `seconds`: ends the run early. The rates then follow the clock, and no second run gives the same bytes.

    RecipeError for options that are out of their bounds, and where all losses have weight 0.
    """

    steps: int = 400
    batch: int = 16
    rate: float = 0.01
    scale_rate: float = 0.005
    kept_rate: float = 0.0
    units: str = "steps"
    warmup: float = 0.05
    floor: float = 0.05
    slow: float = 0.95
    distill: float = 1.0
    text: float = 0.0
    hidden: float = 0.0
    clip: float = 0.0
    inside: float = 0.9
    fitted: bool = False
    at_once: int = 4
    seconds: float | None = None
    seed: int = 0

    name: ClassVar[str] = "train"

    def __post_init__(self) -> None:
        check_options(self, **BOUNDS)
        if self.units not in UNITS:
            raise RecipeError(f"train: units {self.units!r}; it must be one of {', '.join(UNITS)}; choose one")
        if not self.distill + self.text + self.hidden > 0:
            raise RecipeError("train: no loss; distill, text or hidden must be above 0; set one")

    @property
    def needs_teacher(self) -> bool:
        return self.distill > 0 or self.hidden > 0

    def length(self, done: float) -> float:
        """The rates' share of themselves when a share `done` of the run is over."""
        if done < self.warmup:
            return (done + 1 / self.steps) / (self.warmup + 1 / self.steps)
        rest = (done - self.warmup) / max(1 - self.warmup, 1e-9)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))

    def to_json(self) -> dict[str, Any]:
        """As in whit.json."""
        return asdict(self)
