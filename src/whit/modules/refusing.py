"""The `weight` of a packed module: it answers for its dtype and device, and refuses to be computed with or copied from.

PEFT merges an adapter with `layer.weight.data += delta`, its PiSSA and OLoRA decompose the base, and transformers
resizes a vocabulary by copying rows. The tensor is empty, so that torch would complain of shapes, or would give an
empty result: a model whose head has no inputs. Here it is said what to do instead. An addition to codes would have to
round, which is never done in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whit.errors import PackedWeightError

MERGING = (
    "nothing can be added to it or multiplied by it (merging an adapter); floats are needed for that; call "
    "dequantize() on the model and load the adapter onto the result, keep the adapter beside the packed weight, or "
    "write a merged model by whit merge"
)
RESIZING = (
    "none of its rows can be copied (resizing the vocabulary); floats are needed for that; resize the model before it "
    "is quantized, or keep its embedding and head in 16 bits (modules_to_not_convert)"
)
DECOMPOSING = (
    "cannot be decomposed (init_lora_weights 'pissa' and 'olora' would change it); floats are needed for that; start "
    "the adapter from what quantization has lost by whit.initialize_adapter, or do it on the original and quantize "
    "the base that it leaves"
)


def _by_name() -> dict[str, str]:
    """What is said, by the name of torch's function; each exists as an operator, a method and a function."""
    said = dict.fromkeys(("add", "sub", "mul", "matmul", "linear"), MERGING)
    said |= dict.fromkeys(("getitem", "index_select", "narrow", "mean"), RESIZING)
    said |= dict.fromkeys(("svd", "linalg_svd", "svd_lowrank", "qr", "linalg_qr"), DECOMPOSING)
    around = (("", ""), ("", "_"), ("__", "__"), ("__i", "__"), ("__r", "__"))
    return {f"{before}{name}{after}": what for name, what in said.items() for before, after in around}


_REFUSED = _by_name()


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
        if what := _REFUSED.get(getattr(func, "__name__", "")):
            raise PackedWeightError(f"weight: is packed, and {what}")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:  # torch's own takes an empty one for a wrapper
        with torch._C.DisableTorchFunctionSubclass():
            memo[id(self)] = copied = torch.empty_like(self).as_subclass(PackedAway)
        return copied


def refusing(weight: Tensor) -> Tensor:
    """The same empty tensor, refusing."""
    return weight if isinstance(weight, PackedAway) else weight.as_subclass(PackedAway)
