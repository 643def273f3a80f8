"""How an adapter is trained: one frozen value, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from whit.errors import TrainingError
from whit.formats import parse_format
from whit.recipe import Recipe
from whit.training.data import TooLong
from whit.training.init import METHODS as INITS
from whit.training.optimizers import OPTIMIZERS
from whit.training.packing import Portion

ALL_LINEAR = "all-linear"
DEFAULT_INIT = "default"
CONTEXT = 1024
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Tuning:
    """The settings of a run that trains an adapter. With the data and the seed they decide every byte of it.

    - `format` quantizes a full-precision MODEL first (None: as it is), by `method` (None: to nearest). A method that
      needs data, such as gptq or refine, uses the examples, and its codes are written beside the adapter.
    - `init`: where the adapter starts: from zero (default), or from what quantization lost, in the weights (`loftq`) or
      in outputs on the examples (`data`; see `initialize_adapter`). With a method that needs data, `data` fits codes
      and start to each other.
    - `targets`: names of linears, or ("all-linear",) for all but the head.
    - A step is `accumulate` times `batch` rows of at most `context` tokens (None: 1024, or what the model was built for
      if that is less), whatever the number of processes. `steps`, if given, counts instead of `epochs`.
    - `learning_rate` is reached after the share `warmup` of the steps and falls to 0 along a cosine. `clip`: the
      largest norm of the gradient (0: no limit).
    - `holdout`: the share of examples that are not trained on but scored every `evaluate_every` steps (None: ten times
      a run); another file's examples take their place where one is given.
    - `shard` spreads the packed weights over the processes of a run and changes nothing that is learned.

    Raises TrainingError and FormatError.
    """

    format: str | None = None
    method: str | None = None
    init: str = DEFAULT_INIT
    rank: int = 16
    alpha: float = 8.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 4
    accumulate: int = 4
    context: int | None = None
    packing: bool = True
    too_long: TooLong = "cut"
    learning_rate: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    checkpointing: bool = True
    dtype: str = "auto"
    holdout: float = 0.05
    evaluate_every: int | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        if self.format is not None:
            object.__setattr__(self, "format", str(parse_format(self.format)))
        for name in ("rank", "batch", "accumulate", "steps", "evaluate_every"):
            self._at_least(name, 1)
        self._at_least("context", 2)
        for name in ("alpha", "epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TrainingError(f"{name.replace('_', '-')} {value}: must be above 0; choose such a number")
        for name in ("dropout", "warmup", "holdout"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name} {getattr(self, name)}: must lie in [0, 1); choose such a share")
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise TrainingError(
                    f"{name.replace('_', '-')} {getattr(self, name)}: must not be below 0; use 0 or more"
                )
        self._one_of("optimizer", OPTIMIZERS)
        self._one_of("init", (DEFAULT_INIT, *INITS))
        if self.format is None and (self.init != DEFAULT_INIT or self.method is not None):
            raise TrainingError(
                f"{'method' if self.method else 'init'}: nothing is quantized here; the original weights must be known "
                "for it; give a full-precision MODEL and --format"
            )
        if self.calibrated and self.init == "loftq":
            raise TrainingError(
                f"init loftq: goes by weights alone, and {self.method} by data; both must go by the same; use --init "
                "data, or another --method"
            )
        self._one_of("dtype", DTYPES)
        self._one_of("too_long", ("cut", "drop", "refuse"))
        if not self.targets or (ALL_LINEAR in self.targets and len(self.targets) > 1):
            raise TrainingError(f"targets {list(self.targets)}: must be {ALL_LINEAR}, or names of linears; give one")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise TrainingError(f"{name.replace('_', '-')} {value}: must be at least {least}; choose a larger one")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            said = name.replace("_", "-")
            raise TrainingError(
                f"{said} {getattr(self, name)!r}: not known; must be one of {', '.join(known)}; choose one"
            )

    @property
    def calibrated(self) -> bool:
        """Whether the method that quantizes looks at data."""
        return self.method is not None and Recipe(self.method).needs_stats

    @property
    def portion(self) -> Portion:
        """How rows become steps."""
        return Portion(self.context or CONTEXT, self.batch, self.accumulate, self.epochs, self.steps, self.packing)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0 to steps - 1: linear warm-up, then a cosine to nothing."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in whit.json."""
        return asdict(self)
