"""Which parameter of a model gets which format, and whether it can have it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from whit.activations import Activations, parse_activations
from whit.errors import CheckpointError, RecipeError
from whit.export.settle import settle
from whit.export.whit import Whit
from whit.formats import parse_format
from whit.model.targets import Target, find_targets, tied_weights
from whit.modules import TiedEmbedding, TiedHead
from whit.recipe import Recipe
from whit.recipe.preflight import check_recipe
from whit.tensor import Format


def plan_formats(model: nn.Module, recipe: Recipe, ties: Mapping[str, str]) -> dict[Target, Format]:
    """The formats that a recipe gives; a matrix that several modules share is listed once, under its owner.

    RecipeError lists everything that does not fit.
    """
    targets = {target.parameter: target for target in find_targets(model)}
    groups = {
        parameter: (target, *(targets[name] for name, owner in ties.items() if owner == parameter and name in targets))
        for parameter, target in targets.items()
        if parameter not in ties
    }
    holders = [target.holder for target in targets.values()]
    if recipe.mix:
        recipe = settle(recipe, Whit(model, Path()), model, groups).recipe
    slips = set(recipe.unmatched(holders))
    # Rules that keep a module which is not there are no errors: skip lists are shared between models.
    rules = [rule for rule in recipe.rules if rule[0] not in slips or rule[1].bits != 16]
    formats = check_recipe(recipe.with_rules(rules), groups, holders)
    return {targets[parameter]: format for parameter, format in formats.items() if format is not None}


def shared_weights(model: nn.Module, stored: Mapping[str, str]) -> dict[str, str]:
    """Of the weights that transformers would tie (name to owner), those of which no differing copy is stored.

    `stored` maps the names in the weight files to the files; empty if the files cannot be listed.
    """
    ties = tied_weights(model)

    def tensor(name: str) -> Tensor | None:
        found = next((n for n in _with_and_without_prefix(model, name) if n in stored), None)
        if found is None:
            return None
        with torch.device("cpu"), safe_open(stored[found], framework="pt") as handle:  # transformers set "meta"
            return handle.get_tensor(found)  # type: ignore[no-any-return]

    def differs(name: str, owner: str) -> bool:
        copy, original = tensor(name), tensor(owner)
        return copy is not None and original is not None and not torch.equal(copy, original)

    return {name: owner for name, owner in ties.items() if not differs(name, owner)}


def match_formats(model: nn.Module, formats: Mapping[str, str]) -> dict[Target, Format]:
    """The targets that a checkpoint's map of formats names.

    Names may lack or have the base model's prefix, and modules that this class of model does not have are left out.
    """
    targets = {target.holder: target for target in find_targets(model)}
    plan = {}
    for holder, spec in formats.items():
        name = next((n for n in _with_and_without_prefix(model, holder) if n in targets), None)
        if name is not None:
            plan[targets[name]] = parse_format(spec)
    if formats and not plan:
        raise CheckpointError(
            f"config.json: none of the {len(formats)} quantized modules exists in {type(model).__name__}; "
            "load the class of model that was quantized"
        )
    return plan


def match_inputs(plan: Collection[Target], inputs: Mapping[str, str], model: nn.Module) -> dict[str, Activations]:
    """How the inputs of planned targets are quantized, by holder; names are matched as `match_formats` does."""
    found = {}
    for target in plan:
        name = next((n for n in _with_and_without_prefix(model, target.holder) if n in inputs), None)
        if name is not None:
            found[target.holder] = parse_activations(inputs[name])
    return found


def packed_ties(model: nn.Module, plan: Mapping[Target, Format], stored: Collection[str]) -> dict[str, str]:
    """Which weights a checkpoint of whit shares: name to owner, the owner among the planned."""
    planned = {target.parameter for target in plan}
    result = {}
    for name, owner in tied_weights(model).items():
        if name in planned and owner not in planned and not _is_stored(model, owner, stored):
            name, owner = owner, name  # only the other one of the two was stored
        if owner in planned and name not in planned and not _is_stored(model, name, stored):
            result[name] = owner
    return result


def check_complete(model: nn.Module, expected: Iterable[str], present: Collection[str]) -> None:
    """Raise CheckpointError where packed tensors that config.json promises are not in the weight files."""
    missing = [name for name in expected if not _is_stored(model, name, present)]
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
    if target.kind != "experts" and any(m is model.get_submodule(target.holder) for m in shared):
        raise CheckpointError(
            f"{parameter}: not in the weight files, though other modules share it; "
            "it must be stored under this name to be quantized; save the model again with transformers"
        )


def _is_stored(model: nn.Module, name: str, stored: Collection[str]) -> bool:
    return any(n in stored for n in _with_and_without_prefix(model, name))


def _with_and_without_prefix(model: Any, name: str) -> tuple[str, ...]:
    prefix = getattr(model, "base_model_prefix", "") + "."
    return name, name.removeprefix(prefix), prefix + name
