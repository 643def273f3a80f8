"""A checkpoint of whit as a source of parameters: what is packed comes back dequantized, in float32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whit.activations import Activations, parse_activations
from whit.checkpoint.header import Entry
from whit.checkpoint.reader import Checkpoint, read_json
from whit.errors import CheckpointError
from whit.export.whit import packed_specs
from whit.formats import parse_format
from whit.layouts import layout_named
from whit.model.source import NOT_STORED, Origin
from whit.model.targets import Target, find_targets
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec


class PackedSource:
    """The same attributes as `ModelSource`, over a checkpoint of whit."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, packed: Mapping[str, Any]) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.config = read_json(checkpoint.folder / "config.json")
        self.layout = layout_named(packed["layout"])
        self.tied: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.origins: dict[str, Origin] = {}
        self.packed: dict[str, tuple[Target, Format]] = {}
        self.inputs = {holder: parse_activations(spec) for holder, spec in packed.get("inputs", {}).items()}
        by_parameter = {t.parameter: t for t in find_targets(model) if t.holder in packed["formats"]}
        state = model.state_dict()
        for name, tensor in state.items():
            if name in checkpoint:
                self.origins[name] = Origin(checkpoint.entries[name].spec, (name,))
            elif name in by_parameter:
                target = by_parameter[name]
                format = parse_format(packed["formats"][target.holder])
                self.packed[name] = target, format
                specs = packed_specs(target, format, self.inputs.get(target.holder))
                self.origins[name] = Origin(TensorSpec(tuple(tensor.shape), torch.float32), tuple(specs), name)
        self._account(state, packed)

    def read(self, name: str) -> Tensor:
        """One parameter as the model holds it: float32 where it was packed, else its own dtype."""
        if name not in self.packed:
            return self.checkpoint[name]
        weight = self.quantized(name).dequantize()
        return weight.mT.contiguous() if self.packed[name][0].transposed else weight

    def entry(self, name: str) -> Entry | None:
        """Where a parameter that is not packed lies."""
        return None if name in self.packed else self.checkpoint.entries[name]

    def format(self, name: str) -> Format | None:
        """The format of a parameter, None of one that is not packed."""
        return self.packed[name][1] if name in self.packed else None

    def input_rounding(self, name: str) -> tuple[Activations, Mapping[str, Tensor]] | None:
        """How the inputs of a quantized parameter are rounded; static scales are left out."""
        how = self.inputs.get(self.packed[name][0].holder) if name in self.packed else None
        return None if how is None else (how, {})

    def quantized(self, name: str) -> QuantizedTensor:
        """A packed parameter as it is in the file."""
        target, format = self.packed[name]
        keys = self.origins[name].keys
        tensors = {key.removeprefix(f"{target.holder}."): self.checkpoint[key] for key in keys}
        return self.layout.unpack(PackedWeight(self.layout.name, format, target.shape, tensors))

    def note(self, name: str) -> str | None:
        """Nothing: every parameter has its format."""
        return None

    def coded(self, name: str) -> bool:
        """Whether a parameter is packed."""
        return name in self.packed

    def _account(self, state: Mapping[str, Tensor], packed: Mapping[str, Any]) -> None:
        for target, owner in (self.model.all_tied_weights_keys or {}).items():
            if (target in self.origins) != (owner in self.origins):
                absent, present = (target, owner) if owner in self.origins else (owner, target)
                self.tied[absent] = present
        specs: dict[str, TensorSpec] = {}
        for target, format in self.packed.values():
            specs |= packed_specs(target, format, self.inputs.get(target.holder))
        wrong = [k for k, s in specs.items() if k not in self.checkpoint or self.checkpoint.entries[k].spec != s]
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        optional = self.model._keys_to_ignore_on_load_missing or ()
        for name in state.keys() - self.origins.keys() - self.tied.keys():
            if name in parameters and not any(re.search(pattern, name) for pattern in optional):
                wrong.append(name)
            else:
                self.dropped[name] = NOT_STORED
        used = {key for origin in self.origins.values() for key in origin.keys}
        reason = f"{type(self.model).__name__} has no such parameter"
        self.dropped |= {key: reason for key in self.checkpoint if key not in used}
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {', '.join(sorted(wrong)[:5])} and in all {len(wrong)} tensors are "
                "missing or have another shape than their format; all must be there; quantize the model again"
            )
