"""Parts of a model that a device map puts aside: kept unquantized, on the CPU beside a GPU in float32.

bitsandbytes' `llm_int8_enable_fp32_cpu_offload`. What goes into such a part is cast to its type, and what comes out of
it back to the type in which the model computes. What lies on disk has that type already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ASIDE = ("cpu", "disk")


def put_aside(device_map: Any) -> tuple[str, ...]:
    """Names of the modules that are not where the model computes: a GPU where it has one, else the CPU."""
    if not isinstance(device_map, Mapping):
        return ()
    places = {name: str(place) for name, place in device_map.items()}
    elsewhere = ASIDE if set(places.values()) - set(ASIDE) else ("disk",)
    return tuple(name for name, place in places.items() if place in elsewhere)


def is_inside(holder: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of these or inside one."""
    return any(not name or holder == name or holder.startswith(f"{name}.") for name in names)


def compute_apart(model: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Let these modules compute in the type of their own parameters; all around is `dtype`."""
    for name in names:
        module = model.get_submodule(name)
        own = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
        if own != dtype:
            module.register_forward_pre_hook(
                lambda _, args, kwargs, own=own: (_cast(args, own), _cast(kwargs, own)), with_kwargs=True
            )
            module.register_forward_hook(lambda _, __, output: _cast(output, dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, value)
