"""The format of a run whose user names none: what the kind of file usually holds, in groups that fit the model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from whit.export import Exporter
from whit.formats import parse_format
from whit.formats.ggml.mixes import ONLY_MIXES
from whit.formats.lowrank import LowRank, side_car
from whit.model.targets import find_targets
from whit.recipe import Recipe
from whit.recipe.recipe import DEFAULT_RULES
from whit.spoken import of_all_blocks
from whit.tensor import Format

GROUPS = (128, 64, 32)


def with_usual(recipe: Recipe, kind: type[Exporter], model: nn.Module) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a format where the user named none, and the sentence that says which one."""
    if not recipe.usual:
        return recipe, ()
    own, why = recipe.rules[0][1], ""
    kept: dict[str, int] = {}
    beside = side_car(own)
    chosen: Format | str = own  # a transform has its own; a side-car goes with no mix
    if str(own if beside is None else beside.base) == DEFAULT_RULES[0][1]:
        if kind.example not in ONLY_MIXES:
            format, why, kept = _fitting(parse_format(kind.example), recipe, model)
            chosen = format if beside is None else LowRank(format, beside.rank)
        elif beside is None:
            chosen = kind.example
    said = [f"{name} is kept: no usual group divides its {columns} columns" for name, columns in kept.items()]
    settled = recipe.with_usual(chosen)
    if kept:  # rules of the user's own come after them
        first, *others = settled.rules
        settled = settled.changed(rules=[first, *((name, "bf16") for name in kept), *others])
    return settled, (f"no format is named: {chosen} is taken{why}", *said)


def _fitting(format: Format, recipe: Recipe, model: nn.Module) -> tuple[Format, str, dict[str, int]]:
    """The format in the largest usual groups that divide the rows that it is for, and why they are not its own.

    Modules of which no usual group divides the rows are kept, by pattern with their columns, where others are
    quantized: SigLIP's of 4304 columns. Where there are no others, the pre-flight says which rows do not fit.
    """
    own, size = recipe.rules[0][1], format.group_size
    targets = [t for t in find_targets(model) if recipe.format_for(t.holder, t.kept_by_default) == own]
    odd = {t.holder: t.shape[-1] for t in targets if t.shape[-1] % GROUPS[-1]} if size in GROUPS else {}
    kept = {of_all_blocks(holder): columns for holder, columns in odd.items()}
    kept = kept if len(odd) < len(targets) else {}
    rows = {target.shape[-1] for target in targets if not kept or target.holder not in odd}
    fitting = [group for group in GROUPS if group <= size and not any(columns % group for columns in rows)]
    if size not in GROUPS or not fitting or fitting[0] == size:
        return format, "", kept
    other = min(columns for columns in rows if columns % size)
    changed: Format = replace(format, group_size=fitting[0])  # type: ignore[type-var]
    return changed, f", since {other} columns are not a multiple of {size}", kept
