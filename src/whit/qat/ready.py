"""Trained values on their way into the file: a feed of the pipeline that hands out what is there already."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from whit.feed import Given
from whit.plan import Item, Source, Unit
from whit.tensor import QuantizedTensor


class Ready:
    """`values` by name of the parameter; what has none, and what errors are measured from, comes from the `source`.

    Codes are handed out on `device`, where their errors are measured.
    """

    def __init__(self, source: Source, values: Mapping[str, QuantizedTensor | Tensor], device: torch.device) -> None:
        self.source, self.values, self.device = source, values, device

    def unit(self, unit: Unit) -> AbstractContextManager[None]:
        return nullcontext()

    def changes(self, item: Item) -> bool:
        return item.name in self.values

    def give(self, item: Item) -> Given:
        value = self.values.get(item.name)
        if isinstance(value, QuantizedTensor):
            return Given(self.source.read(item.name), quantized=value.to(self.device))
        if value is not None:
            return Given(value.cpu(), note="trained")
        return Given(self.source.read(item.name))

    def take_back(self, item: Item, approximation: Tensor) -> None:
        """Nothing runs, so nothing needs it."""
