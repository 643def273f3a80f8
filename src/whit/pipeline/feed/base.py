"""What a feed is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from whit.pipeline.near import Near
from whit.pipeline.plan import Item, Unit
from whit.tensor import LayerStats, QuantizedTensor


@dataclass(frozen=True)
class Given:
    """A parameter and, where calibration reached it, one LayerStats per matrix; `tokens` counts what each expert saw,
    `starved` are the experts that saw too few and have the statistics of all. `quantized` is there where the method
    has chosen the codes of the whole block already. `note` is what was done to the weight itself. `inputs` are the
    static scales of the linear's inputs, where these are quantized so."""

    weight: Tensor
    stats: tuple[LayerStats, ...] | None = None
    quantized: QuantizedTensor | None = None
    tokens: tuple[int, ...] | None = None
    starved: tuple[int, ...] = ()
    note: str | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


class Feed(Protocol):
    """Hands out the parameters of one unit after the other."""

    def unit(self, unit: Unit) -> AbstractContextManager[None]:
        """To be open while the unit's parameters are handed out."""
        ...

    def changes(self, item: Item) -> bool:
        """Whether a parameter that is kept must be asked for all the same, because it is not what the file holds."""
        ...

    def give(self, item: Item) -> Given:
        """A parameter that is not copied as it is; asked for in the plan's order."""
        ...

    def take_back(self, item: Item, approximation: Tensor | Near) -> None:
        """What the parameter has become, in the shape of the model's own."""
        ...


class NothingRuns:
    """What feeds share behind which no block runs: nothing is to be opened, changed or taken back."""

    def unit(self, unit: Unit) -> AbstractContextManager[None]:
        """Nothing to be open."""
        return nullcontext()

    def changes(self, item: Item) -> bool:
        """What is kept is what the file holds."""
        return False

    def take_back(self, item: Item, approximation: Tensor | Near) -> None:
        """No later block needs it."""
