"""Several processes that train one adapter: each takes its share of a step's micro-batches, gradients are summed.

The base is frozen and whole in every process. Adapters are small, so their gradients travel once a step, in one
tensor; how many processes there are changes what a step costs and the order of its sums, not what it learns from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from whit.errors import TrainingError


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; the first, 0, alone writes files and speaks.

    `together`: weights are shared too, and each process has to run as often as the others.
    """

    rank: int = 0
    size: int = 1
    together: bool = False

    @staticmethod
    def here() -> Ranks:
        """As torch.distributed was set up; alone where it was not."""
        if dist.is_available() and dist.is_initialized():
            return Ranks(dist.get_rank(), dist.get_world_size())
        return Ranks()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check(self, accumulate: int) -> None:
        """TrainingError where a step has fewer micro-batches than there are processes."""
        if accumulate < self.size:
            raise TrainingError(
                f"accumulate {accumulate}: {self.size} processes share a step's micro-batches; each must have one; "
                f"use --accumulate {self.size}, and a smaller --batch for steps of the same size"
            )

    def turns(self, count: int) -> list[tuple[int, bool]]:
        """Which of `count` micro-batches this process runs, and whether it counts.

        One that does not is the first one again, run because the others still have one.
        """
        own = [(index, True) for index in range(self.rank, count, self.size)]
        missing = -(-count // self.size) - len(own) if self.together else 0
        return own + [(0, False)] * missing

    def sum(self, value: Tensor) -> Tensor:
        """The same tensor, summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes its sum over all processes; one that is missing counts as 0."""
        if self.size == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = self.sum(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for p, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def share(self, content: bytes | None, device: torch.device) -> bytes | None:
        """What the first process has, in all of them (None where it has nothing)."""
        if self.size == 1:
            return content
        there = -1 if content is None else len(content)
        length = torch.tensor([there if self.first else 0], device=device)
        dist.broadcast(length, 0)
        if (count := int(length)) < 0:
            return None
        data = torch.empty(count, dtype=torch.uint8, device=device)
        if self.first and content:
            data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return data.cpu().numpy().tobytes()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
