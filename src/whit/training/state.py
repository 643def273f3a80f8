"""A checkpoint of training as bytes: adapters and optimizer, exactly, in safetensors.

Nothing else has a state. Data order, learning rate and the random numbers of dropout are functions of seed and step.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from whit.errors import CheckpointError, reason_of
from whit.training.optimizers import flatten, restore

META = "json"


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bytes:
    """After `step` steps."""
    tensors: dict[str, Tensor] = {
        f"adapter.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad
    }
    described = {"step": step, "optimizer": flatten(optimizer.state_dict(), tensors)}
    # A tensor and not a header's text: safetensors writes the keys of that in any order.
    tensors[META] = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    return bytes(save(tensors))


def load_state(content: bytes, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint back; the number of steps that it stands after. CheckpointError where it is damaged, or of
    another model."""
    try:
        return _put_back(load(content), model, optimizer)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint: damaged ({reason_of(error)}); it must be as an earlier run left it; pass --restart to begin "
            "again"
        ) from None


def _put_back(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    described: dict[str, Any] = json.loads(tensors.pop(META).numpy().tobytes())
    ours = {f"adapter.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name for name in tensors if name.startswith("adapter.")}
    if ours.keys() != theirs:
        raise CheckpointError(
            f"checkpoint: holds {len(theirs)} adapter tensors and the model has {len(ours)}, or other ones; "
            "they must be the same; pass --restart to begin again"
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(restore(described["optimizer"], tensors))
    return int(described["step"])
