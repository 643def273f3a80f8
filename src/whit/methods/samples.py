"""What block-wise refinement and training run over: a block's inputs, and what the block should make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.methods.base import Block

RESIDENT = 3  # the samples lie on a GPU when they take less than the free memory by this factor


class Samples:
    """Inputs and targets, near the device: on it where they fit, otherwise sent in time and without waiting."""

    def __init__(self, block: Block, device: torch.device, targets: Tensor) -> None:
        self.device, self.count = device, len(targets)
        self._inputs, self._targets = block.inputs, targets
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)  # what torch keeps for itself is free as well
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if RESIDENT * (block.inputs.nbytes + targets.nbytes) < free:
                self._inputs, self._targets = block.inputs.to(device), targets.to(device)

    @property
    def resident(self) -> bool:
        """Whether all of them lie on the device."""
        return self._inputs.device == self._targets.device == self.device

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and targets of these samples (n,), each (n, context, hidden) on the device."""
        return self._send(self._inputs, numbers), self._send(self._targets, numbers)

    def _send(self, samples: Tensor, numbers: Tensor) -> Tensor:
        if samples.device == self.device:
            return samples[numbers.to(self.device, non_blocking=True)]
        return samples[numbers].pin_memory().to(self.device, non_blocking=True)
