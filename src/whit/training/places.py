"""Where an adapter's factors lie in a model with packed linears: they are read here, and set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import UnsupportedModelError
from whit.modules import QuantizedLinear


@dataclass(frozen=True)
class Place:
    """A packed linear of the model, with the adapter's layer around it where there is one."""

    name: str
    packed: QuantizedLinear
    layer: Any | None


def set_factors(model: nn.Module, given: Callable[[str], tuple[Tensor, Tensor]], adapter: str = "default") -> None:
    """Set the adapter of every packed linear that has one to the B (out, rank) and A (rank, in) `given` for its name,
    so that s B' A = B A: its scaling s is honoured, and DoRA's magnitudes become the row norms of Q + B A."""
    with torch.no_grad():
        for name, place in find_places(model, adapter).items():
            if place.layer is not None:
                put(place, adapter, *given(name))


def put(place: Place, adapter: str, b: Tensor, a: Tensor) -> None:
    layer: Any = place.layer
    layer.lora_A[adapter].weight.data.copy_(a)
    layer.lora_B[adapter].weight.data.copy_(b.to(torch.float32) / float(layer.scaling[adapter]))
    if adapter in getattr(layer, "lora_magnitude_vector", ()):
        layer.lora_magnitude_vector[adapter].weight.data.copy_(effective(place, adapter).norm(dim=1))


def effective(place: Place, adapter: str) -> Tensor:
    """What a linear multiplies by as it is now: Q + s B A (out, in) in float32."""
    near, layer = place.packed.dequantize(torch.float32), place.layer
    if layer is None:
        return near
    a, b = (getattr(layer, key)[adapter].weight.data.to(torch.float32) for key in ("lora_A", "lora_B"))
    product: Tensor = b @ a
    return near + float(layer.scaling[adapter]) * product


def find_places(model: nn.Module, adapter: str) -> dict[str, Place]:
    """The packed linears of a PEFT model by their names in the model below it."""
    below: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    around = {
        id(module.base_layer): module
        for module in below.modules()
        if hasattr(module, "base_layer") and adapter in getattr(module, "lora_A", ())
    }
    places = {}
    for name, module in below.named_modules():
        if isinstance(module, QuantizedLinear):
            plain = name.removesuffix(".base_layer")
            places[plain] = Place(plain, module, around.get(id(module)))
    if all(place.layer is None for place in places.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__}: has no LoRA adapter {adapter!r} around a packed linear; its factors are what is "
            "set; call peft.get_peft_model on a quantized model first"
        )
    return places
