"""A size in bytes turned into an ordinary recipe, whose file has that size from below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from whit.allocation.budget import Choice, allocate
from whit.allocation.divergence import measure_divergence
from whit.allocation.sensitivity import Group, measure_sensitivity
from whit.allocation.space import Methods, bytes_of, free_formats, ladder_of, methods_of
from whit.allocation.tables import Band, banded_format, bytes_of_band
from whit.calibration import CalibrationTokens
from whit.errors import RecipeError
from whit.methods import Method
from whit.model.targets import find_targets
from whit.pipeline.job import Job
from whit.pipeline.plan import Item, Plan, plan_quantization
from whit.recipe import Recipe
from whit.tensor import Format

Measure = Literal["kl", "probe", "hessian"]


@dataclass(frozen=True)
class Budgeted:
    """The recipe, its plan, and the error that it is expected to add: nats per token, or shares of blocks' outputs."""

    recipe: Recipe
    plan: Plan
    error: float


def budgeted(
    job: Job, size_bytes: int, tokens: CalibrationTokens, ladder: Sequence[str | Format] | None = None,
    measure: Measure = "probe",
) -> Budgeted:  # fmt: skip
    """The recipe with the least expected error whose weight files have at most `size_bytes`.

    `job` is prepared with a rule that keeps everything; its other rules stay, and what they name is not chosen here.
    An entry of the ladder is a format, to be tried with the recipe's method, or `METHOD:SPEC`. RecipeError where no
    format of the ladder fits a matrix, or where the size cannot be met.
    """
    ladder = ladder or ladder_of(job)
    wanted = free_formats(job, ladder)
    items = {item.name: item for item in job.plan.items}
    smallest = {n: min(f, key=lambda form, n=n: bytes_of(job, items[n], form)) for n, f in wanted.items()}  # type: ignore[misc]
    check_size(planned(job, smallest)[1], size_bytes)  # before the model is run
    return solve(job, measured(job, tokens.tokens, wanted, measure, methods_of(job, ladder)), size_bytes)


def measured(
    job: Job, tokens: Tensor, wanted: Mapping[str, tuple[Format, ...]], measure: Measure = "probe",
    methods: Methods | None = None,
) -> tuple[Group, ...]:  # fmt: skip
    """The errors of all groups in all formats; they serve any size. `tokens` is int64 (samples, context).

    Of the `methods` that a format has the best one counts. `kl`: the divergence, by a forward per format and method;
    `probe`: by two per group and method; `hessian`: shares of the blocks' outputs.
    """
    if measure == "hessian":
        return measure_sensitivity(job, tokens, wanted, methods)
    return measure_divergence(job, tokens, wanted, measure == "kl", methods=methods)


def solve(job: Job, groups: Sequence[Group], size_bytes: int) -> Budgeted:
    """Solve, plan, and solve again with what the plan's headers really take, until the file fits."""
    items = {item.name: item for item in job.plan.items}
    choices = [[Choice(_bytes(job, items, g, f), e) for f, e in g.errors.items()] for g in groups]
    ladders = [tuple(group.errors) for group in groups]
    smallest = [min(range(len(c)), key=lambda i, c=c: (c[i].bytes, i)) for c in choices]  # type: ignore[misc]
    chosen = tuple(smallest)
    overhead = 0
    while True:
        picked = [(groups[g], ladders[g][i]) for g, i in enumerate(chosen)]
        formats = _formats(picked)
        methods = {p: group.methods[form] for group, form in picked for p in group.parameters if form in group.methods}
        recipe, plan = planned(job, formats, methods)
        taken = sum(choices[g][i].bytes for g, i in enumerate(chosen))
        if overhead and plan.size_bytes <= size_bytes:
            error = sum(choices[g][i].error for g, i in enumerate(chosen))
            return Budgeted(recipe, plan, error)
        if list(chosen) == smallest:
            check_size(plan, size_bytes)
        overhead = max(overhead + 1, plan.size_bytes - taken)
        room = max(size_bytes - overhead, sum(c[i].bytes for c, i in zip(choices, smallest, strict=True)))
        chosen = allocate(choices, room)


def _bytes(job: Job, items: Mapping[str, Item], group: Group, format: Format) -> int:
    """What a group takes in the file in a format."""
    if group.band is not None:
        return bytes_of_band(job, items[group.parameters[0]], format, group.band)
    return sum(bytes_of(job, items[parameter], format) for parameter in group.parameters)


def _formats(picked: Sequence[tuple[Group, Format]]) -> dict[str, Format]:
    """By parameter; the bands of a table together."""
    formats = {p: form for group, form in picked for p in group.parameters}
    bands: dict[str, list[tuple[Band, Format]]] = {}
    for group, form in picked:
        if group.band is not None:
            bands.setdefault(group.parameters[0], []).append((group.band, form))
    return formats | {name: banded_format(sorted(parts, key=lambda part: part[0])) for name, parts in bands.items()}


def planned(
    job: Job, formats: Mapping[str, Format], methods: Mapping[str, Method] | None = None
) -> tuple[Recipe, Plan]:
    """The recipe of a choice, and its plan."""
    recipe = recipe_of(job, formats, methods)
    return recipe, plan_quantization(job.source, recipe, job.exporter, job.options.shard_size)


def check_size(plan: Plan, size_bytes: int) -> None:
    """RecipeError where even the plan of the smallest formats is larger."""
    if plan.size_bytes > size_bytes:
        raise RecipeError(
            f"budget: {size_bytes} bytes, {8 * size_bytes / plan.parameters:.3f} bits per weight; the smallest file "
            f"that the formats give has {plan.size_bytes}, {plan.bits_per_weight:.3f}; ask for more, or add smaller "
            "formats with --ladder"
        )


def recipe_of(job: Job, formats: Mapping[str, Format], methods: Mapping[str, Method] | None = None) -> Recipe:
    """The commonest format for everything, a rule by name for what has another, then the user's own rules.

    What has a method of `methods` that is not the recipe's own has it named in a rule.
    """
    assert job.recipe is not None
    targets = find_targets(job.source.model)
    usual = Counter(formats[t.parameter] for t in targets if t.parameter in formats and not t.kept_by_default)
    rules: list[tuple[str, Format]] = [("*", usual.most_common(1)[0][0])]
    if job.exporter.whole(Recipe(None, rules)) != Recipe(None, rules):  # a type for everything stands for a mix there
        rules = [job.recipe.rules[0]]
    named: list[tuple[str, Method]] = []
    for target in targets:
        owner = job.source.tied.get(target.parameter, target.parameter)
        format, method = formats.get(owner), (methods or {}).get(owner, job.recipe.method)
        if format is not None and (target.kept_by_default or format != rules[0][1] or method != job.recipe.method):
            rules.append((target.holder, format))
        if method != job.recipe.method:
            named.append((target.holder, method))
    return job.recipe.with_rules([*rules, *job.recipe.rules[1:]]).with_methods(named)
