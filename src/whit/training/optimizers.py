"""Optimizers by name, and their state as plain tensors and JSON.

AdamW is torch's. With 8-bit moments (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021,
arXiv:2110.02861), and paged into the CPU's memory when a GPU is full, it is bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import TrainingError

OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
BETAS = (0.9, 0.999)
TENSOR, MAPPING, SEQUENCE = "tensor", "mapping", "sequence"


def make_optimizer(name: str, parameters: list[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    """One of OPTIMIZERS over the adapters; TrainingError where it does not run here, with the reason."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=decay)
    return _foreign(name, parameters[0].device)(parameters, lr=rate, betas=BETAS, weight_decay=decay)


def _foreign(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes import optim
    except Exception as error:  # it raises what it likes where its library does not fit
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise TrainingError(
            f"optimizer {name}: bitsandbytes cannot be imported ({said}); it must be there for 8-bit and paged "
            "optimizers; pip install bitsandbytes, or use --optimizer adamw"
        ) from None
    if name.startswith("paged") and device.type != "cuda":
        raise TrainingError(
            f"optimizer {name}: pages between a GPU and the CPU; the model must be on a GPU; "
            f"use --optimizer {name.removeprefix('paged-')}"
        )
    kinds = {"adamw-8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw-8bit": "PagedAdamW8bit"}
    return getattr(optim, kinds[name])  # type: ignore[no-any-return]


def flatten(value: Any, tensors: dict[str, Tensor], name: str = "optimizer") -> Any:
    """A state_dict as JSON, its tensors put into `tensors` under names of their own."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # bitsandbytes shares tables between states
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {MAPPING: [[key, flatten(inner, tensors, f"{name}.{key}")] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {SEQUENCE: [flatten(inner, tensors, f"{name}.{i}") for i, inner in enumerate(value)]}
    return value


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given."""
    if not isinstance(value, Mapping):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if MAPPING in value:
        return {key: restore(inner, tensors) for key, inner in value[MAPPING]}
    return [restore(inner, tensors) for inner in value[SEQUENCE]]
