"""A checkpoint of another quantizer as a source of parameters: dequantized in float32, or as whit's own codes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.checkpoint.header import Entry
from whit.errors import CheckpointError
from whit.export.linears import put_rows
from whit.export.readers import Foreign, inputs_of
from whit.methods.stack import can_stack
from whit.model.source import ModelSource
from whit.model.targets import find_targets
from whit.tensor import Format, QuantizedTensor


class ForeignSource(ModelSource):
    """The same attributes as `ModelSource`; `format` and `quantized` give what is behind a parameter."""

    def __init__(self, model: PreTrainedModel, foreign: Foreign) -> None:
        self.foreign = foreign
        turned = [target.parameter for target in find_targets(model) if target.transposed]
        for name in [key for key in foreign.packed if any(p == key or p.endswith(f".{key}") for p in turned)]:
            foreign.transpose(name)
        super().__init__(model, foreign)

    def entry(self, name: str) -> Entry | None:
        """None for what is quantized in the file, or has no place of its own there."""
        found = None if any(key in self.foreign.packed for key in self.origins[name].keys) else super().entry(name)
        return found if found is not None and found.stop > found.start else None

    def format(self, name: str) -> Format | None:
        """The format in which a parameter can be had without quantizing it again; None where it has none."""
        origin = self.origins[name]
        packed = [self.foreign.packed.get(key) for key in origin.keys]
        formats = {item.format if item is not None else None for item in packed}
        found = formats.pop() if len(formats) == 1 else None
        if found is None or origin.first is None:
            return found
        return found if can_stack(found) and self._order(name) is not None else None

    def quantized(self, name: str) -> QuantizedTensor:
        """A parameter in its `format`, exactly as it is in the file."""
        origin = self.origins[name]
        values = [self.foreign.packed[key].read() for key in origin.keys]
        parts = [value for value in values if isinstance(value, QuantizedTensor)]
        assert len(parts) == len(values), name
        if origin.first is None:
            return parts[0]
        order = self._order(name)
        assert order is not None, name
        counts = [len(part.codes) for part in parts]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return put_rows(list(zip(torch.split(places, counts), parts, strict=True)), origin.spec.shape)

    def input_rounding(self, name: str) -> tuple[Activations, dict[str, Tensor]] | None:
        """How the file says that the inputs of a parameter with a `format` are rounded, with static scales.

        None where they stay as they are. CheckpointError where whit cannot do so, or the scales are not there.
        """
        module, format = self.origins[name].keys[0].removesuffix(".weight"), self.format(name)
        if format is None:
            return None
        own = self.foreign.packed[self.origins[name].keys[0]].inputs
        how = inputs_of(dict(self.config.get("quantization_config") or {}), module) if own is None else own()
        if how is None:
            return None
        if not how.fits(format):
            raise CheckpointError(f"inputs are rounded to {how}, which {format} is not multiplied by")
        checkpoint, scales = self.foreign.checkpoint, {}
        for key, spec in how.specs.items():
            if (stored := f"{module}.{key}") not in checkpoint or checkpoint[stored].numel() != 1:
                raise CheckpointError(f"inputs are rounded to {how}, and {stored} is not a single number")
            scales[key] = checkpoint[stored].reshape(spec.shape).to(spec.dtype)
        return how, scales

    def note(self, name: str) -> str | None:
        """Why a quantized parameter has no format."""
        notes = (self.foreign.packed[key].note for key in self.origins[name].keys if key in self.foreign.packed)
        return next((note for note in notes if note), None)

    def coded(self, name: str) -> bool:
        """Whether a parameter lies in the file as codes."""
        packed = (self.foreign.packed.get(key) for key in self.origins[name].keys)
        return any(item is not None and item.dtype is None for item in packed)

    def _order(self, name: str) -> Tensor | None:
        """For each row of a parameter that is assembled from parts: which row of all parts, one after another, it is.

        None where assembling does more than put rows together.
        """
        origin, numbers, start = self.origins[name], {}, 0
        assert origin.first is not None
        for key in origin.keys:
            rows = self.foreign.entries[key].spec.shape[0]
            numbers[key] = torch.arange(start, start + rows).unsqueeze(1)
            start += rows
        order = self._convert(origin.first, numbers.__getitem__)[name]
        plain = order.shape[:-1] == origin.spec.shape[:-1] and order.shape[-1] == 1 and order.numel() == start
        return order.reshape(-1) if plain else None
