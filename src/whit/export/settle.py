"""A recipe settled on a model: a mix becomes a rule per matrix, and types that do not fit a file's rows fall back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from whit.capabilities import rotation
from whit.export.base import Exporter
from whit.formats import parse_format
from whit.formats.ggml.mixes import MIXES, Place, Role, mixed_type
from whit.formats.lowrank import side_car, without_side_car
from whit.formats.rotated import without_rotation
from whit.model.targets import Target, input_table
from whit.recipe import Recipe
from whit.tensor import Format

ROLES: tuple[tuple[str, Role], ...] = (
    (r"(attn|attention)\.(c_proj|out_proj|dense)$|o_proj$", "attention_output"),
    (r"v_proj$|\.value$|(c_attn|query_key_value|Wqkv)$", "v"),
    (r"down_proj$|mlp\.c_proj$|fc2$|dense_4h_to_h$", "ffn_down"),
)


@dataclass(frozen=True)
class Settled:
    """Rules alone, and why a parameter has another format than the recipe says."""

    recipe: Recipe
    reasons: Mapping[str, str]


def settle(
    recipe: Recipe, exporter: Exporter, model: PreTrainedModel, groups: Mapping[str, tuple[Target, ...]]
) -> Settled:
    """`groups` maps a stored parameter to the targets that share it."""
    rules = Recipe(recipe.method, recipe.rules)
    more: list[tuple[str, Format]] = []
    reasons = {}
    embedding = _input_embedding(model)
    for parameter, targets in groups.items():
        wanted = next((f for t in targets if (f := rules.format_for(t.holder, t.kept_by_default))), None)
        ruled = any(rules.rules_for(t.holder, t.kept_by_default) for t in targets)
        chosen = wanted
        if recipe.mix and not ruled and (place := _place(targets, model, embedding)):
            base = parse_format(MIXES[recipe.mix])
            chosen = parse_format(mixed_type(recipe.mix, place, base.group_size))
        if chosen is None:
            continue
        fitting, reason = exporter.adapted(targets[0], chosen)
        if fitting is not None and side_car(fitting) is not None and targets[0].kind not in ("linear", "conv1d"):
            fitting, reason = without_side_car(fitting), "a side-car goes beside linears alone"
        if fitting is not None and rotation(fitting) and targets[0].kind not in ("linear", "conv1d"):
            fitting, reason = without_rotation(fitting), "linears alone are rotated"
        if reason is not None:
            reasons[parameter] = reason
        if fitting != wanted:
            more += [(t.holder, fitting or parse_format("bf16")) for t in targets]
    return Settled(recipe.with_rules([*rules.rules, *more]), reasons)


def _input_embedding(model: PreTrainedModel) -> str:
    found = input_table(model)
    return next((name for name, module in model.named_modules() if module is found), "")


def _place(targets: tuple[Target, ...], model: PreTrainedModel, embedding: str) -> Place | None:
    """Where a matrix stands; None for what no mix touches: tables of positions, gates of experts, narrow linears."""
    config, target = model.config, targets[0]
    heads = getattr(config, "num_attention_heads", 1)
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    block = re.search(r"\.(\d+)\.", target.holder)
    role: Role = next((role for pattern, role in ROLES if re.search(pattern, target.holder)), "other")
    tied = len(targets) > 1 or bool(getattr(config, "tie_word_embeddings", False))
    if any(t.is_head for t in targets) or (target.holder == embedding and tied):
        role = "head"
    elif target.kind == "embedding":
        if target.holder != embedding:
            return None
        role = "embedding"
    elif target.is_gate or target.is_narrow:
        return None
    return Place(role, int(block[1]) if block else 0, config.num_hidden_layers, shared, target.shape[-1])
