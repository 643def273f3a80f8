"""whit's own checkpoint: packed tensors under `<holder>.<tensor>`, and a config.json that says every format.

A linear `...q_proj` in `int4-g128` is stored as `...q_proj.codes` and `...q_proj.scale` in the layout `bits`; what is
not quantized lies under its own name. `quantization_config` maps each holder to its format: loading needs no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from whit.layouts import BITS
from whit.model.targets import Target
from whit.recipe import Recipe
from whit.tensor import Format, QuantizedTensor, TensorSpec

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


def packed_specs(target: Target, format: Format) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the tensors that hold a target in a format."""
    return {f"{target.holder}.{key}": spec for key, spec in BITS.specs(format, target.shape).items()}


def packed_tensors(target: Target, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors themselves."""
    return {f"{target.holder}.{key}": tensor for key, tensor in BITS.pack(quantized).tensors.items()}


def quantization_config(recipe: Recipe, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `formats` maps each holder to what it was quantized to."""
    resolved = {holder: str(format) for holder, format in formats.items()}
    return {"quant_method": QUANT_METHOD, "layout": BITS.name, **recipe.to_dict(), "formats": resolved}
