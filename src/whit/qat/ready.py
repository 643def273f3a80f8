"""Trained values on their way into the file: a feed of the pipeline that hands out what is there already."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whit.pipeline.feed import Given, NothingRuns
from whit.pipeline.plan import Item
from whit.pipeline.sources import Source
from whit.tensor import QuantizedTensor


class Ready(NothingRuns):
    """`values` by name of the parameter; what has none comes from the `source`, and what errors are measured from,
    where nothing else is `exact`.

    Codes are handed out on `device`, where their errors are measured.
    """

    def __init__(
        self, source: Source, values: Mapping[str, QuantizedTensor | Tensor], device: torch.device,
        exact: Source | None = None,
    ) -> None:  # fmt: skip
        self.source, self.values, self.device, self.exact = source, values, device, exact or source

    def changes(self, item: Item) -> bool:
        return item.name in self.values

    def give(self, item: Item) -> Given:
        value = self.values.get(item.name)
        if isinstance(value, QuantizedTensor):
            return Given(self.exact.read(item.name), quantized=value.to(self.device), inputs=self._inputs(item))
        if value is not None:
            return Given(value.cpu(), note="trained")
        return Given(self.source.read(item.name))

    def _inputs(self, item: Item) -> dict[str, Tensor]:
        """The trained range of a linear's inputs, where it is static."""
        keys = () if item.activations is None or item.target is None else item.activations.specs
        found = {key: self.values[f"{item.target.holder}.{key}"] for key in keys if item.target is not None}
        return {key: value for key, value in found.items() if isinstance(value, Tensor)}
