"""Packed weights spread over processes: each holds a share of every block, and has the whole of one block at a time.

torch's `fully_shard` (FSDP2) gathers the packed bytes of a block before its forward and backward, as they are stored:
a quarter of what 16-bit weights would send at 4 bits. Adapters, norms, embeddings and head stay whole everywhere; the
adapters' gradients are summed as ever (`ranks`), so that a sharded run learns what any other does.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from whit.errors import TrainingError
from whit.model.graph import lists_of_blocks
from whit.modules import QuantizedLinear
from whit.training.ranks import Ranks


def shard_packed(model: Any, ranks: Ranks) -> Ranks:
    """Spread the packed linears of each block over all processes, in place; how these work from now on.

    TrainingError where there is one process only, nothing packed, or a torch that cannot leave parameters alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if ranks.size < 2:
        raise TrainingError("shard: one process; there must be several to share weights; start them with torchrun")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise TrainingError(
            f"shard: torch {torch.__version__} cannot leave adapters whole; 2.7 is needed; update torch"
        )
    mesh = init_device_mesh(model.device.type, (ranks.size,))
    packed = {name: m.make_shardable() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not packed:
        raise TrainingError("shard: no packed linears; what is shared must be quantized; pass --format nf4-dq")
    shared = {p for parameters in packed.values() for p in parameters}
    whole: set[nn.Parameter] = {p for p in model.parameters() if p not in shared}
    for block in itertools.chain.from_iterable(lists_of_blocks(model, packed).values()):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return replace(ranks, together=True)
