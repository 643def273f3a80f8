"""How the linears of another quantizer's checkpoint round their inputs, which is not part of the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from whit.activations import THRESHOLD, Activations
from whit.errors import CheckpointError, RecipeError


def inputs_of(config: Mapping[str, Any], module: str) -> Activations | None:
    """What a `quantization_config` says of a linear's inputs, by its name in the file; None: they stay as they are.

    CheckpointError where inputs are rounded in a way that whit has none for, such as to 4 bits.
    """
    method = config.get("quant_method")
    if method == "bitnet":
        return Activations()
    if method == "bitsandbytes" and config.get("load_in_8bit"):
        return Activations(threshold=float(config.get("llm_int8_threshold", THRESHOLD)))
    if method == "compressed-tensors":
        groups = [g for g in dict(config.get("config_groups") or {}).values() if isinstance(g, Mapping)]
        found = next((g for g in groups if any(_meant(str(t), module) for t in g.get("targets") or ())), None)
        said = None if found is None else found.get("input_activations")
        return None if said is None else _of_arguments(dict(said))
    return None


def _meant(target: str, module: str) -> bool:
    """Whether a target of compressed-tensors is this linear: its class, its name, or an expression after `re:`."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def _of_arguments(said: Mapping[str, Any]) -> Activations:
    """From compressed-tensors' QuantizationArgs."""
    kind, strategy = "dynamic" if said.get("dynamic") else "static", str(said.get("strategy") or "tensor")
    type = {"int": "int8", "float": "fp8"}.get(str(said.get("type", "int")))
    try:
        if said.get("num_bits") != 8 or type is None or said.get("dynamic") not in (True, False, None):
            raise RecipeError("whit has 8 bits, dynamic or static")
        return Activations(kind, type, bool(said.get("symmetric", True)), strategy)
    except RecipeError as error:
        words = ", ".join(f"{key} {said.get(key)}" for key in ("num_bits", "type", "strategy", "dynamic"))
        raise CheckpointError(f"inputs are rounded with {words}: {error}") from None
