"""whit's own checkpoint: packed tensors under `<holder>.<tensor>`, and a config.json that says every format.

A linear `...q_proj` in `int4-g128` is stored as `...q_proj.codes` and `...q_proj.scale` in the layout `bits`; what is
not quantized lies under its own name. `quantization_config` maps each holder to its format: loading needs no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from whit.activations import Activations
from whit.export.base import Outcome, Parameter, Value
from whit.export.folder import FolderExport, short_name
from whit.layouts import BITS
from whit.model.targets import Target
from whit.recipe import Recipe
from whit.tensor import Format, PackedWeight, QuantizedTensor, TensorSpec

QUANT_METHOD = "whit"

CARD = """---
library_name: transformers
tags: [whit, quantized]
---

# {name}, quantized by whit

**`import whit` before `from_pretrained`.** Without it transformers only warns and leaves the quantized weights random:

```python
import whit
from transformers import AutoModelForCausalLM  # or the class that fits the task

model = AutoModelForCausalLM.from_pretrained("PATH")
```

{bits_per_weight:.3f} bits per weight, {size_bytes:,} bytes. `whit.json` says what became of every parameter, and
`whit inspect` shows it.
"""


class Whit(FolderExport):
    """The layout `bits`, every format."""

    name: ClassVar[str] = "whit"
    summary: ClassVar[str] = "whit's own: every format, read by transformers after `import whit`"

    def specs(self, parameter: Parameter) -> Mapping[str, TensorSpec]:
        if parameter.target is None or parameter.format is None:
            return super().specs(parameter)
        return packed_specs(parameter.target, parameter.format, parameter.activations)

    def tensors(self, parameter: Parameter, value: Value) -> Mapping[str, Tensor]:
        if parameter.target is None or not isinstance(value, QuantizedTensor):
            return super().tensors(parameter, value)
        return {f"{parameter.target.holder}.{key}": tensor for key, tensor in BITS.pack(value).tensors.items()}

    def refuses(self, activations: Activations) -> str | None:
        return None

    def inputs(self, parameter: Parameter, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert parameter.target is not None
        return {f"{parameter.target.holder}.{key}": tensor for key, tensor in scales.items()}

    def restore(self, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Value:
        if parameter.target is None or parameter.format is None:
            return super().restore(parameter, tensors)
        plain = {name.removeprefix(f"{parameter.target.holder}."): tensor for name, tensor in tensors.items()}
        return BITS.unpack(PackedWeight(BITS.name, parameter.format, parameter.target.shape, plain))

    def config(self, outcome: Outcome) -> dict[str, Any]:
        assert outcome.recipe is not None
        if not outcome.formats:  # a plain checkpoint
            return {}
        return {"quantization_config": quantization_config(outcome.recipe, outcome.formats, outcome.inputs)}

    def card(self, outcome: Outcome) -> str:
        name = short_name(outcome.model)
        return CARD.format(name=name, bits_per_weight=outcome.bits_per_weight, size_bytes=outcome.size_bytes)


def packed_specs(target: Target, format: Format, activations: Activations | None = None) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the tensors that hold a target in a format, and how its inputs are quantized."""
    beside = activations.specs if activations is not None else {}
    return {f"{target.holder}.{key}": spec for key, spec in {**BITS.specs(format, target.shape), **beside}.items()}


def quantization_config(
    recipe: Recipe, formats: Mapping[str, Format], inputs: Mapping[str, Activations]
) -> dict[str, Any]:
    """The `quantization_config` of config.json; `formats` maps each holder to what it was quantized to.

    `inputs` maps those whose inputs are quantized too to how.
    """
    resolved = {holder: str(format) for holder, format in formats.items()}
    said = {"quant_method": QUANT_METHOD, "layout": BITS.name, **recipe.to_dict(), "formats": resolved}
    return {**said, "inputs": {holder: str(how) for holder, how in inputs.items()}} if inputs else said
