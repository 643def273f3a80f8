"""Everything in a model that a recipe does not fit, found and said at once, before a weight is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from whit.errors import RecipeError
from whit.formats import lowrank, rotated
from whit.methods.stack import can_stack
from whit.model.targets import Target
from whit.recipe import Recipe
from whit.spoken import by_reason
from whit.tensor import Format

USUAL = (256, 128, 64, 32)  # group sizes


def check_recipe(
    recipe: Recipe,
    groups: Mapping[str, tuple[Target, ...]],
    holders: Sequence[str],
    calibrated: bool = False,
    fits: Callable[[Mapping[Target, Format]], list[str]] | None = None,
) -> dict[str, Format | None]:
    """The format of each parameter (None: kept). RecipeError with one sentence per problem.

    `groups` maps a stored parameter to the targets that share it; a rule may name any of them.
    `calibrated` says that statistics will be there; `fits` lists what the file to be written cannot hold.
    """
    problems = [_unmatched(pattern, holders) for pattern in recipe.unmatched(holders)]
    if recipe.needs_stats and not calibrated:
        use = "rtn, clip or hqq" if recipe.method.needs_stats else "dynamic ones, such as int8"
        problems.append(
            f"{recipe.title}: needs calibration data, and there is none while a model is loaded; use {use}, "
            "or write the model by whit.quantize"
        )
    formats: dict[str, Format | None] = {}
    for parameter, targets in groups.items():
        named = [f for t in targets if (f := recipe.format_for(t.holder, t.kept_by_default)) is not None]
        formats[parameter] = named[0] if named else None
        if len(set(named)) > 1:
            both = " and ".join(t.holder for t in targets)
            problems.append(f"{both}: one tied weight with the formats {named[0]} and {named[1]}; give both the same")
    chosen = {groups[p][0]: f for p, f in formats.items() if f is not None}
    problems += _misfits(chosen)
    problems += _unreached(recipe, chosen)
    for refuse in (lowrank.refuse_shape, rotated.refuse_shape):
        problems += by_reason((t.holder, f"{f} for {why}") for t, f in chosen.items() if (why := refuse(f, t.shape)))
    if recipe.needs_stats:
        problems += _unstackable(chosen)
    if fits is not None:
        problems += fits(chosen)
    if problems:
        raise RecipeError("\n".join(problems))
    return formats


def _unmatched(pattern: str, holders: Sequence[str]) -> str:
    if not holders:
        return (
            f"rule {pattern!r}: the model has no module that can be quantized; it must have one; choose another model"
        )
    short = {holder.rpartition(".")[2] for holder in holders}
    near = difflib.get_close_matches(pattern, sorted({*holders, *short}), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"names look like {holders[len(holders) // 2]}"
    return f"rule {pattern!r}: matches no module of the model; it must match one; {hint}"


def _misfits(formats: Mapping[Target, Format]) -> list[str]:
    """Groups that do not divide in_features."""
    wrong = []
    for target, format in formats.items():
        columns, size = target.shape[-1], format.group_size
        if size and columns % size:
            said = f"in_features {columns} is not divisible by group_size {size}; {_advice(columns, format)}"
            wrong.append((target.holder, said))
    return by_reason(wrong)


def _advice(columns: int, format: Format) -> str:
    """Another group size, or another format where this one has no other."""
    fit, bits = _fitting_group(columns, format.group_size), max(int(format.bits), 2)
    if "group_size" in getattr(format, "__dataclass_fields__", {}):
        grouped = 1 < fit < columns or fit in USUAL
        other = str(replace(format, group_size=fit)) if grouped else "a format per channel"  # type: ignore[type-var]
        return f"use {other}, or add a rule for it"
    other = f"int{bits}-g{fit}" if fit > 1 else f"int{bits}-channel"
    return f"{format} has no other; use {other}, or add a rule for it"


def _unstackable(formats: Mapping[Target, Format]) -> list[str]:
    """Stacks of experts, each with statistics of its own, in a format whose params span experts."""
    wrong = {f: t.holder for t, f in formats.items() if t.kind == "experts" and not can_stack(f)}
    return [
        f"{holder}: {format} has params that span experts, which calibration treats one by one; "
        "every expert must have its own; use a format without -dq or -tensor"
        for format, holder in wrong.items()
    ]


def _unreached(recipe: Recipe, formats: Mapping[Target, Format]) -> list[str]:
    """Activations that no linear takes."""
    how, names = next(iter(recipe.all_activations), None), sorted({str(f) for f in formats.values()})
    if how is None or not formats or any(recipe.activations_for(t.holder, t.kind, f) for t, f in formats.items()):
        return []
    return [
        f"activations {how}: no linear can be multiplied by them in {', '.join(names)}; its weights must be of the "
        f"same type with one scale per row; use {how.type} for the weights too"
    ]


def _fitting_group(columns: int, size: int) -> int:
    """The largest group size up to `size` that divides `columns`: a usual one, else multiples of 64, 32 or 8 first."""
    if usual := [group for group in USUAL if group <= size and columns % group == 0]:
        return usual[0]
    divisors = [d for d in range(size, 1, -1) if columns % d == 0]
    for multiple in (64, 32, 8, 1):
        if found := [d for d in divisors if d % multiple == 0]:
            return found[0]
    return 1
