"""Said once where packed weights are multiplied without the kernels that were made for them."""

from __future__ import annotations

import warnings

from torch import nn

from whit.errors import WhitWarning
from whit.kernels.cpu import library
from whit.modules import PackedModule


def warn_of_slow_products(model: nn.Module) -> None:
    """A WhitWarning where packed weights lie on a CPU and its compiled kernels are not there: why, and what to do.

    Every product is right without them; it decodes the weight first, in torch.
    """
    reason = library()
    if isinstance(reason, str) and any(_on_cpu(module) for module in model.modules()):
        said = f"CPU kernels: {reason}; until then torch decodes weights for every product, many times slower"
        warnings.warn(said, WhitWarning, stacklevel=2)


def _on_cpu(module: nn.Module) -> bool:
    return isinstance(module, PackedModule) and module.packed.device.type == "cpu"
