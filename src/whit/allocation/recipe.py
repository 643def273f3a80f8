"""A size in bytes turned into an ordinary recipe, whose file has that size from below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whit.allocation.budget import Choice, allocate
from whit.allocation.sensitivity import LADDER, Group, measure_sensitivity
from whit.calibration import CalibrationTokens
from whit.errors import RecipeError
from whit.export.base import Parameter
from whit.formats import parse_format
from whit.job import Job
from whit.model.graph import find_blocks
from whit.model.targets import find_targets
from whit.plan import Item, Plan, plan_quantization
from whit.recipe import Recipe
from whit.tensor import Format


@dataclass(frozen=True)
class Budgeted:
    """The recipe, its plan, and the error that it is expected to add (shares of blocks' outputs, summed)."""

    recipe: Recipe
    plan: Plan
    error: float


def budgeted(job: Job, size_bytes: int, tokens: CalibrationTokens, ladder: Sequence[str | Format] = LADDER) -> Budgeted:
    """The recipe with the least expected error whose weight files have at most `size_bytes`.

    `job` is prepared with a rule that keeps everything; its other rules stay, and what they name is not chosen here.
    Linears outside the blocks are not reached by the calibration and get the largest format that fits. RecipeError
    where no format of the ladder fits a matrix, or where the size cannot be met.
    """
    assert job.recipe is not None
    fixed = Recipe(None, job.recipe.rules[1:])
    free = [i for i in job.plan.items if i.target and not i.target.kept_by_default and i.format is None]
    free = [i for i in free if i.target and not fixed.rules_for(i.target.holder)]
    items = {item.name: item for item in free}
    wanted = {item.name: _fitting(job, item, [parse_format(f) for f in ladder]) for item in free}
    prefixes = tuple(f"{name}." for name in find_blocks(job.source.model).names)
    inside = {name: formats for name, formats in wanted.items() if name.startswith(prefixes)}
    outside = {name: formats[-1] for name, formats in wanted.items() if name not in inside}
    if not inside:
        raise RecipeError("budget: rules name every linear of the blocks; some must be free to choose; drop a rule")
    smallest = {n: min(f, key=lambda form, n=n: _bytes(job, items[n], form)) for n, f in inside.items()}  # type: ignore[misc]
    _check_size(_planned(job, {**outside, **smallest})[1], size_bytes)  # before the model is run
    groups = measure_sensitivity(job, tokens.tokens, inside)
    return _allocated(job, groups, outside, size_bytes)


def _fitting(job: Job, item: Item, ladder: Sequence[Format]) -> tuple[Format, ...]:
    """The formats of the ladder, as the file holds them, that fit a matrix."""
    assert item.target is not None
    found = []
    for format in map(job.exporter.fitted, ladder):
        divides = not format.group_size or item.target.shape[-1] % format.group_size == 0
        if divides and format not in found and not job.exporter.problems({item.target: format}):
            found.append(format)
    if not found:
        raise RecipeError(
            f"{item.target.holder}: no format of the ladder fits its {item.target.shape[-1]} columns in a "
            f"{job.exporter.name} file; one must; add a rule for it"
        )
    return tuple(found)


def _allocated(job: Job, groups: Sequence[Group], outside: Mapping[str, Format], size_bytes: int) -> Budgeted:
    """Solve, plan, and solve again with what the plan's headers really take, until the file fits."""
    items = {item.name: item for item in job.plan.items}
    choices = [
        [Choice(sum(_bytes(job, items[p], f) for p in g.parameters), e) for f, e in g.errors.items()] for g in groups
    ]
    ladders = [tuple(group.errors) for group in groups]
    smallest = [min(range(len(c)), key=lambda i, c=c: (c[i].bytes, i)) for c in choices]  # type: ignore[misc]
    chosen = tuple(smallest)
    overhead = 0
    while True:
        formats = {p: ladders[g][i] for g, i in enumerate(chosen) for p in groups[g].parameters}
        recipe, plan = _planned(job, {**outside, **formats})
        taken = sum(choices[g][i].bytes for g, i in enumerate(chosen))
        if overhead and plan.size_bytes <= size_bytes:
            error = sum(choices[g][i].error for g, i in enumerate(chosen))
            return Budgeted(recipe, plan, error)
        if list(chosen) == smallest:
            _check_size(plan, size_bytes)
        overhead = max(overhead + 1, plan.size_bytes - taken)
        room = max(size_bytes - overhead, sum(c[i].bytes for c, i in zip(choices, smallest, strict=True)))
        chosen = allocate(choices, room)


def _planned(job: Job, formats: Mapping[str, Format]) -> tuple[Recipe, Plan]:
    recipe = _recipe(job, formats)
    return recipe, plan_quantization(job.source, recipe, job.exporter, job.options.shard_size)


def _check_size(plan: Plan, size_bytes: int) -> None:
    """RecipeError where even the plan of the smallest formats is larger."""
    if plan.size_bytes > size_bytes:
        raise RecipeError(
            f"budget: {size_bytes} bytes, {8 * size_bytes / plan.parameters:.3f} bits per weight; the smallest file "
            f"that the formats give has {plan.size_bytes}, {plan.bits_per_weight:.3f}; ask for more, or quantize "
            "embeddings with a rule"
        )


def _bytes(job: Job, item: Item, format: Format) -> int:
    """What a parameter takes in the file in a format, without its line in the header."""
    specs = job.exporter.specs(Parameter(item.name, item.spec, item.target, format))
    return sum(spec.nbytes for spec in specs.values())


def _recipe(job: Job, formats: Mapping[str, Format]) -> Recipe:
    """The commonest format for everything, a rule by name for what has another, then the user's own rules."""
    assert job.recipe is not None
    usual = Counter(formats.values()).most_common(1)[0][0]
    rules: list[tuple[str, Format]] = [("*", usual)]
    for target in find_targets(job.source.model):
        format = formats.get(job.source.tied.get(target.parameter, target.parameter), usual)
        if format != usual:
            rules.append((target.holder, format))
    return job.recipe.with_rules([*rules, *job.recipe.rules[1:]])
