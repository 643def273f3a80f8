"""The `weight` of a packed linear: it answers for its dtype and device, and refuses to be added to or multiplied by.

PEFT merges an adapter with `layer.weight.data += delta`. The tensor is empty, so that torch would complain of shapes;
here it is said what to do instead. An addition to codes would have to round, which is never done in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whit.errors import PackedWeightError

# By name: each exists as an operator, a method and a function.
_REFUSED = frozenset(
    f"{before}{name}{after}"
    for name in ("add", "sub", "mul", "matmul", "linear")
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__i", "__"), ("__r", "__"))
)


class PackedAway(Tensor):
    """An empty tensor (out_features, 0) with the dtype and device in which a module stands for floats."""

    _is_hf_initialized = True  # where a model of transformers draws the numbers of its parts itself (Mamba 2)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _REFUSED:
            raise PackedWeightError(
                "weight: is packed, and nothing can be added to it or multiplied by it (merging an adapter); "
                "floats are needed for that; call dequantize() on the model and load the adapter onto the result, "
                "keep the adapter beside the packed weight, or write a merged model by whit merge"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:  # torch's own takes an empty one for a wrapper
        with torch._C.DisableTorchFunctionSubclass():
            memo[id(self)] = copied = torch.empty_like(self).as_subclass(PackedAway)
        return copied


def refusing(weight: Tensor) -> Tensor:
    """The same empty tensor, refusing."""
    return weight if isinstance(weight, PackedAway) else weight.as_subclass(PackedAway)
