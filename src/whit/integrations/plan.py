"""Which parameter of a model gets which format, and whether it can have it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from whit.errors import CheckpointError, FormatError, RecipeError
from whit.formats import parse_format
from whit.model.targets import Target, find_targets, tied_weights
from whit.modules import TiedEmbedding, TiedHead
from whit.recipe import Recipe
from whit.tensor import Format


def plan_formats(model: nn.Module, recipe: Recipe) -> dict[Target, Format]:
    """The formats that a recipe gives; a matrix that several modules share is listed once, under its own name.

    A rule for any of the sharing modules counts, the owner's first. FormatError lists every target that does not fit.
    """
    ties = tied_weights(model)
    targets = {target.parameter: target for target in find_targets(model)}
    plan: dict[Target, Format] = {}
    for parameter, target in targets.items():
        sharing = [targets[name] for name, source in ties.items() if source == parameter and name in targets]
        if parameter in ties or (sharing and target.kind != "embedding"):
            continue
        formats = [recipe.format_for(t.holder, t.kept_by_default) for t in (target, *sharing)]
        if format := next((f for f in formats if f is not None), None):
            plan[target] = format
    check_plan(plan)
    return plan


def check_plan(plan: Mapping[Target, Format]) -> None:
    """Raise FormatError that lists every target whose in_features its group size does not divide."""
    offenders = []
    for target, format in plan.items():
        columns, size = target.shape[-1], format.group_size
        if size and columns % size:
            fits = next(n for n in (256, 128, 64, 32, 16, 8, 4, 2, 1) if columns % n == 0 and n <= size)
            offenders.append(
                f"{target.holder}: in_features {columns} is not divisible by group_size {size}; "
                f"use {fits}, or add a rule for it"
            )
    if offenders:
        raise FormatError("\n".join(offenders))


def check_method(recipe: Recipe) -> None:
    """Raise RecipeError for a method that cannot work while weights are loaded."""
    if recipe.method.needs_stats:
        raise RecipeError(
            f"method {recipe.method.name}: it needs calibration, and loading has none; "
            "use rtn, clip or hqq, or write a checkpoint with whit.quantize"
        )


def match_formats(model: nn.Module, formats: Mapping[str, str]) -> dict[Target, Format]:
    """The targets that a checkpoint's map of formats names.

    Names may lack or have the base model's prefix, and modules that this class of model does not have are left out.
    """
    ties = tied_weights(model)
    targets = {target.holder: target for target in find_targets(model) if target.parameter not in ties}
    plan = {}
    for holder, spec in formats.items():
        name = next((n for n in _with_and_without_prefix(model, holder) if n in targets), None)
        if name is not None:
            plan[targets[name]] = parse_format(spec)
    if not plan:
        raise CheckpointError(
            f"config.json: none of the {len(formats)} quantized modules exists in {type(model).__name__}; "
            "load the class of model that was quantized"
        )
    return plan


def check_complete(model: nn.Module, expected: Iterable[str], present: set[str]) -> None:
    """Raise CheckpointError where packed tensors that config.json promises are not in the weight files."""
    missing = [n for n in expected if not any(name in present for name in _with_and_without_prefix(model, n))]
    if missing:
        raise CheckpointError(
            f"{missing[0]}: not in the weight files ({len(missing)} packed tensors missing); "
            "the checkpoint is incomplete; download or quantize it again"
        )


def check_absent(parameter: str, target: Target, conversions: Iterable[Any], model: nn.Module) -> None:
    """Raise where a weight that should have been quantized was not, for any reason but that no file has it."""
    fused = [c for c in conversions if len(c.target_patterns) > 1]  # one stored tensor becomes several weights
    if any(re.search(pattern, parameter) for c in fused for pattern in c.target_patterns):
        raise RecipeError(
            f"{target.holder}: its weight is stored in one tensor with others that the rules keep; "
            "these must be quantized together; write one rule for all of them"
        )
    shared = [m.source for m in model.modules() if isinstance(m, TiedHead | TiedEmbedding)]
    if target.kind == "embedding" and any(m is model.get_submodule(target.holder) for m in shared):
        raise CheckpointError(
            f"{parameter}: not in the weight files, though other modules share it; "
            "it must be stored under this name to be quantized; save the model again with transformers"
        )


def _with_and_without_prefix(model: Any, name: str) -> tuple[str, ...]:
    prefix = getattr(model, "base_model_prefix", "") + "."
    return name, name.removeprefix(prefix), prefix + name
