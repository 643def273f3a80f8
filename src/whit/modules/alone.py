"""`whit.set_deterministic`: a batch-invariant mode, in which no row of a product depends on the rows beside it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from whit.errors import UnsupportedModelError
from whit.modules.experts import QuantizedExperts
from whit.modules.packed import PackedModule
from whit.tensor import Activated

M = TypeVar("M", bound=nn.Module)


def set_deterministic(model: M, on: bool = True) -> M:
    """Let every packed linear of a model give each row the same bits whatever batch it is in; returns the model.

    Only packed linears: attention, norms, and a head that is not quantized are torch's. With several rows it costs
    speed: a GPU keeps to its invariant kernels, and CPUs and formats without such a kernel take a few rows at a time.
    Without it, results are the same from run to run, but the sums of a row may be taken in another order in another
    batch.

    UnsupportedModelError, before anything is changed, where a row cannot be independent: activations whose outlier
    columns or scale depend on all rows together (llm.int8, int8-tensor), and stacked experts.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    for name, module in packed.items() if on else ():
        check_rows_apart(name, isinstance(module, QuantizedExperts), module.activations)
    for module in packed.values():
        module.set_deterministic(on)
    return model


def check_rows_apart(name: str, are_experts: bool, activations: Activated | None) -> None:
    """UnsupportedModelError for a module of that name whose rows depend on each other."""
    if are_experts:
        raise UnsupportedModelError(
            f"{name}: stacked experts; torch multiplies them for all tokens together; leave deterministic out"
        )
    how = activations
    if how is not None and (how.threshold > 0 or (how.kind == "dynamic" and how.granularity == "tensor")):
        raise UnsupportedModelError(
            f"{name}: activations {how} are rounded by what all rows hold together; for a deterministic model "
            "they must be rounded row by row; use int8 or int8-g32, or leave deterministic out"
        )
