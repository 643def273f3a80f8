"""Optimizers by name, and their state as plain tensors and JSON.

AdamW is torch's. With 8-bit moments (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021,
arXiv:2110.02861), and paged into the CPU's memory when a GPU is full, it is bitsandbytes'; with 8-bit and 4-bit moments
(Li et al., "Memory Efficient Optimizers with 4-bit States", 2023, arXiv:2309.01507) also torchao's, which torch.compile
turns into kernels at the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import TrainingError

BITSANDBYTES = {"adamw-8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw-8bit": "PagedAdamW8bit"}
TORCHAO = {"torchao-adamw-8bit": "AdamW8bit", "torchao-adamw-4bit": "AdamW4bit"}
OPTIMIZERS = ("adamw", *BITSANDBYTES, *TORCHAO)
BETAS = (0.9, 0.999)
TENSOR, MAPPING, SEQUENCE, MOMENTS, DTYPE = "tensor", "mapping", "sequence", "moments", "dtype"


def make_optimizer(name: str, parameters: list[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    """One of OPTIMIZERS over the adapters, as `settle_optimizer` gave it."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=decay)
    library, kind = ("torchao", TORCHAO[name]) if name in TORCHAO else ("bitsandbytes", BITSANDBYTES[name])
    make = getattr(import_module(f"{library}.optim"), kind)
    return make(parameters, lr=rate, betas=BETAS, weight_decay=decay)  # type: ignore[no-any-return]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate from the next step on; torchao's compiled steps read it from a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def settle_optimizer(name: str, device: torch.device) -> tuple[str, str | None]:
    """What runs on a device in the place of an optimizer of OPTIMIZERS, and a note where that is another one.

    A paged one gives way to the same without pages, and 8-bit moments of bitsandbytes to torchao's, or to torch's whole
    ones. One that was asked for by torchao's name is refused without torchao (TrainingError).
    """
    if name in TORCHAO and (reason := _missing("torchao")) is not None:
        raise TrainingError(
            f"optimizer {name}: {reason}; it is torchao's; pip install torchao, "
            f"or use --optimizer {name.removeprefix('torchao-') if name.endswith('8bit') else 'adamw'}"
        )
    if name not in BITSANDBYTES:
        return name, None
    chosen, reasons = name, []
    if name.startswith("paged") and device.type != "cuda":
        chosen = name.removeprefix("paged-")
        reasons.append("pages between a GPU and the CPU, and the model is on the CPU")
    if chosen in BITSANDBYTES and (reason := _missing("bitsandbytes")) is not None:
        reasons.append(reason)
        instead = "torchao-adamw-8bit" if chosen.endswith("8bit") else "adamw"
        chosen = instead if instead not in TORCHAO or _missing("torchao") is None else "adamw"
    return chosen, f"optimizer {name}: {'; '.join(reasons)}; {chosen} takes its place" if reasons else None


def _missing(library: str) -> str | None:
    """Why its optimizers cannot be had; None where they can."""
    try:
        import_module(f"{library}.optim")
    except Exception as error:  # whatever an extension of another torch raises
        said = str(error).strip().partition("\n")[0].rstrip(".")
        return f"{library} cannot be imported ({said})"
    return None


def flatten(value: Any, tensors: dict[str, Tensor], name: str = "optimizer") -> Any:
    """A state_dict as JSON, its tensors put into `tensors` under names of their own."""
    if hasattr(value, "__tensor_flatten__"):  # torchao's packed moments
        parts, settings = value.__tensor_flatten__()
        inside = {key: getattr(value, key) for key in parts}
        return {
            MOMENTS: type(value).__name__,
            "parts": flatten(inside, tensors, name),
            "settings": flatten(settings, {}),
        }
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value).removeprefix("torch.")}
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
    if MOMENTS in value:
        from torchao.optim import subclass_4bit, subclass_8bit

        kinds = {"OptimState8bit": subclass_8bit.OptimState8bit, "OptimState4bit": subclass_4bit.OptimState4bit}
        parts, settings = restore(value["parts"], tensors), restore(value["settings"], tensors)
        return kinds[value[MOMENTS]].__tensor_unflatten__(parts, settings)
    if DTYPE in value:
        return getattr(torch, value[DTYPE])
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if MAPPING in value:
        return {key: restore(inner, tensors) for key, inner in value[MAPPING]}
    return [restore(inner, tensors) for inner in value[SEQUENCE]]
