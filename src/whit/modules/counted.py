"""Packed weights counted as the weights that they stand for.

torch and PEFT count the elements of Parameters. Packed tensors are buffers, of bytes that hold several weights. PEFT
knows empty Parameters whose elements lie elsewhere, and asks these for `ds_numel` (DeepSpeed's name for it): one of
them beside each packed weight makes PEFT's `print_trainable_parameters` right, unpatched. It is in no state_dict.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from whit.modules.packed import PackedModule

COUNTED = "counted"


class Counted(nn.Parameter):
    """An empty, frozen parameter that stands for `ds_numel` packed weights."""

    ds_numel: int

    @staticmethod
    def standing_for(module: PackedModule) -> Counted:
        """One for the packed weight of a module, in the dtype and on the device in which the module stands for it."""
        parameter = Counted(torch.empty(0, dtype=module.weight.dtype, device=module.weight.device), requires_grad=False)
        parameter.ds_numel = math.prod(module.weight_shape)
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:  # nn.Parameter's own forgets attributes
        copied = Counted(self.data.clone(), requires_grad=False)
        copied.ds_numel = self.ds_numel
        memo[id(self)] = copied
        return copied


def make_countable(module: PackedModule) -> None:
    """Put a `Counted` beside a packed weight; a second call does nothing. What is saved does not change."""
    if COUNTED in module._parameters:
        return
    module.register_parameter(COUNTED, Counted.standing_for(module))
    module.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_put_in)  # type: ignore[no-untyped-call]


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.pop(prefix + COUNTED, None)


def _put_in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if COUNTED in module._parameters:
        state[prefix + COUNTED] = module._parameters[COUNTED]
