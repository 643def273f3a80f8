"""How many parameters a model has, packed weights counted as what they stand for."""

from __future__ import annotations

import math

from torch import nn

from whit.modules import PackedModule


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters of a model, every packed weight counted as its (out, in) elements.

    A matrix that two modules share counts once. A Linear4bit of bitsandbytes is not known here.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bytes_of = {id(p) for m in model.modules() if isinstance(m, PackedModule) for p in m.shardable}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in bytes_of)
    packed = sum(math.prod(m.weight_shape) for m in model.modules() if isinstance(m, PackedModule))
    return trainable, plain + packed
