"""What the tests of the transformers integration share: loading, and an independent model to compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from whit import QuantizationConfig, quantize_tensor
from whit.model.targets import find_targets, tied_weights
from whit.recipe import Recipe

from tiny_models import ARCHITECTURES, tiny_inputs, tiny_model

INT4 = QuantizationConfig("int4-g32")


def load(folder: Path, architecture: str = "llama", **options) -> PreTrainedModel:
    return ARCHITECTURES[architecture][0].from_pretrained(folder, **options)


def packed_copy(folder: Path, config: QuantizationConfig = INT4, architecture: str = "llama") -> Path:
    """A checkpoint of whit's beside a plain one."""
    out = folder.with_name(f"{folder.name}-packed")
    load(folder, architecture, quantization_config=config).save_pretrained(out)
    return out


def logits(model: PreTrainedModel, architecture: str) -> Tensor:
    with torch.no_grad():
        output = model(**tiny_inputs(architecture))
    return output.logits if "logits" in output else output.last_hidden_state


def fake_quantized(
    model_class: type[PreTrainedModel] | type[AutoModel], folder: Path, recipe: Recipe
) -> PreTrainedModel:
    """The original model in float32 whose weights are replaced by what their codes stand for."""
    model = model_class.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    ties = tied_weights(model)
    targets = {target.parameter: target for target in find_targets(model)}
    for parameter, target in targets.items():
        sharing = [target, *(targets[n] for n, s in ties.items() if s == parameter and n in targets)]
        formats = [f for t in sharing if (f := recipe.format_for(t.holder, t.kept_by_default)) is not None]
        if parameter in ties or not formats:
            continue
        weight = model.get_parameter(parameter).data
        matrix = weight.mT.contiguous() if target.transposed else weight
        floats = quantize_tensor(matrix, formats[0], recipe.method).dequantize()
        weight.copy_(floats.mT if target.transposed else floats)
    return model


def rules_for(architecture: str, format: str, everything: bool) -> list[tuple[str, str]]:
    """One format for all linears, and int8 for embeddings and heads where `everything`."""
    holders = [target.holder for target in find_targets(tiny_model(architecture)) if target.kept_by_default]
    return [("*", format), *((holder, "int8") for holder in holders if everything)]
