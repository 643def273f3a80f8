"""What all exports to a folder of safetensors share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from whit.activations import Activations
from whit.checkpoint.writer import Shard, plan_shards
from whit.export.base import Importance, Outcome, Parameter, Value
from whit.model.targets import Target
from whit.recipe import Recipe
from whit.tensor import Format, QuantizedTensor, TensorSpec


class FolderExport:
    """Parameters under the names of the running model, unquantized ones as they are."""

    name: ClassVar[str]
    summary: ClassVar[str]
    example: ClassVar[str] = "int4-g128"
    suffix: ClassVar[str] = ""
    fuses: ClassVar[bool] = False
    reads_back: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model = model

    @classmethod
    def fitted(cls, format: Format) -> Format:
        return format

    @classmethod
    def whole(cls, recipe: Recipe) -> Recipe:
        return recipe

    def adapted(self, target: Target, format: Format) -> tuple[Format | None, str | None]:
        return format, None

    def refuses(self, activations: Activations) -> str | None:
        return f"{self.name} files say nothing of activations; write a whit or compressed-tensors file"

    def problems(self, formats: Mapping[Target, Format]) -> list[str]:
        return []

    def weighed(self, by: Importance) -> None:
        """No folder has a place for it but whit.json."""

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        """A kept parameter under its own name; subclasses add the quantized ones."""
        return {parameter.name: parameter.spec}

    def verbatim(self, parameter: Parameter) -> bool:
        return parameter.format is None and list(self.specs(parameter).values()) == [parameter.spec]

    def tensors(self, parameter: Parameter, value: Value) -> Mapping[str, Tensor]:
        assert not isinstance(value, QuantizedTensor), parameter.name
        ((name, spec),) = self.specs(parameter).items()
        return {name: value.to(spec.dtype)}

    def inputs(self, parameter: Parameter, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert not scales, parameter.name
        return {}

    def restore(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        (tensor,) = tensors.values()
        return tensor

    def decode(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return None

    def shards(self, parameters: Sequence[Parameter], limit: int) -> tuple[Shard, ...]:
        return plan_shards((item for p in parameters for item in self.specs(p).items()), limit)

    def files(self, outcome: Outcome) -> Mapping[str, bytes]:
        card = self.card(outcome).encode(errors="replace")  # a folder's name may be no text
        return {"config.json": to_json({**outcome.config, **self.config(outcome)}), "README.md": card}

    def takes(self, name: str) -> bool:
        return True

    def config(self, outcome: Outcome) -> dict[str, Any]:
        """What config.json holds besides, or instead of, what MODEL's holds."""
        raise NotImplementedError

    def card(self, outcome: Outcome) -> str:
        """The model card."""
        raise NotImplementedError


def to_json(value: Mapping[str, Any]) -> bytes:
    """As in config.json."""
    return (json.dumps(value, indent=2) + "\n").encode()


def short_name(model: str) -> str:
    """A model's name without the organisation before it."""
    return model.rpartition("/")[2]
