"""What a budget chooses from: the parameters that are free, the formats that each may have, and the bytes of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from whit.errors import RecipeError
from whit.export.base import Parameter
from whit.formats import parse_format
from whit.methods import Clip, Method, parse_method
from whit.model.graph import find_blocks
from whit.pipeline.job import Job
from whit.pipeline.plan import Item
from whit.recipe import Recipe, split_methods
from whit.tensor import Format

# The methods that are tried with a format, where the recipe's own is not the only one.
Methods: TypeAlias = Mapping[Format, tuple[Method, ...]]

# Bit for bit ggml's types lose least, where superblocks of 256 columns divide the rows; integers go everywhere.
LADDER = (
    "int2-g64-asym", "int2-g32-asym", "q2_k", "int3-g64-asym", "q3_k", "int3-g32-asym", "iq4_xs", "int4-g64-asym",
    "q4_k", "iq4_nl", "int4-g32-asym", "int5-g64-asym", "q5_k", "int6-g64-asym", "q6_k", "int7-g64-asym", "int8",
    "int8-g64", "int8-g32",
)  # fmt: skip
# Kinds of file that hold other formats, or whose readers take other groups.
LADDERS: dict[str, tuple[str, ...]] = {
    "gptq": ("int2-g64", "int2-g32", "int3-g64", "int3-g32", "int4-g64", "int4-g32", "int8-g64"),
    "gptq-v2": (
        "int2-g64-asym-f16", "int2-g32-asym-f16", "int3-g64-asym-f16", "int3-g32-asym-f16", "int4-g64-asym-f16",
        "int4-g32-asym-f16", "int8-g64-f16",
    ),
    "compressed-tensors": ("int2-g64", "int2-g32", "int4-g128", "int4-g64", "int4-g32", "int8"),
    "mlx": tuple(f"int{bits}-g{size}-offset" for bits in (2, 3, 4, 5, 6, 8) for size in (64, 32)),
    # Types of superblocks of 256 columns, and for narrower rows those that llama.cpp falls back to.
    "gguf": ("q2_k", "q3_k", "iq4_xs", "q4_k", "iq4_nl", "q4_0", "q5_k", "q5_0", "q5_1", "q6_k", "q8_0"),
}  # fmt: skip


def ladder_of(job: Job) -> tuple[str, ...]:
    """The formats that are tried for a kind of file where the user names none."""
    return LADDERS.get(job.exporter.name, LADDER)


def methods_of(job: Job, ladder: Sequence[str | Format]) -> dict[Format, tuple[Method, ...]]:
    """Methods by format, as the file holds it, from a ladder's entries: `METHOD:SPEC`, or `SPEC` for the recipe's own.

    Formats that are tried with the recipe's own alone are left out.
    """
    assert job.recipe is not None
    found: dict[Format, dict[Method, None]] = {}
    for entry in ladder:
        rules, named = split_methods([("*", entry)])
        method = parse_method(named[0][1]) if named else job.recipe.method
        found.setdefault(job.exporter.fitted(parse_format(rules[0][1])), {})[method] = None
    return {format: tuple(methods) for format, methods in found.items() if tuple(methods) != (job.recipe.method,)}


def without_data(method: Method) -> Method:
    """The method where calibration does not reach: embeddings and heads, whose inputs are not watched."""
    return Clip() if method.needs_stats else method


def free_formats(job: Job, ladder: Sequence[str | Format]) -> dict[str, tuple[Format, ...]]:
    """The formats that may be chosen for each parameter that no rule names, embeddings and heads included.

    `job` is prepared with a rule that keeps everything. Embeddings and heads that the file cannot hold quantized are
    left out, and so are the gates of experts, the narrowest linears, and embeddings inside blocks (T5's biases of
    positions, which multiply nothing). RecipeError where no format fits the matrix of another linear.
    """
    assert job.recipe is not None
    fixed, partners = Recipe(None, job.recipe.rules[1:]), _partners(job)
    formats = [parse_format(rule[1]) for rule in split_methods([("*", entry) for entry in ladder])[0]]
    found = {}
    for item in job.plan.items:
        target = item.target
        if target is None or target.is_gate or target.is_narrow or item.format is not None:
            continue
        if target.kind == "embedding" and inside_blocks(job, item.name):
            continue
        if any(fixed.rules_for(holder) for holder in (target.holder, *partners.get(item.name, ()))):
            continue
        if fitting := _fitting(job, item, formats):
            found[item.name] = fitting
        elif not target.kept_by_default:
            raise RecipeError(
                f"{target.holder}: no format of the ladder fits its {target.shape[-1]} columns in a "
                f"{job.exporter.name} file; one must; add a rule for it"
            )
    if not any(inside_blocks(job, name) for name in found):
        raise RecipeError("budget: rules name every linear of the blocks; some must be free to choose; drop a rule")
    return found


def inside_blocks(job: Job, name: str) -> bool:
    """Whether a parameter belongs to a block, where calibration watches the inputs of linears."""
    return name.startswith(tuple(f"{block}." for block in find_blocks(job.source.model).names))


def bytes_of(job: Job, item: Item, format: Format) -> int:
    """What a parameter takes in the file in a format, without its line in the header."""
    kept = None if format.bits == 16 else format
    specs = job.exporter.specs(Parameter(item.name, item.spec, item.target, kept))
    return sum(spec.nbytes for spec in specs.values())


def _fitting(job: Job, item: Item, ladder: Sequence[Format]) -> tuple[Format, ...]:
    """The formats of the ladder, as the file holds them, that fit a matrix."""
    assert item.target is not None
    found: list[Format] = []
    for format in map(job.exporter.fitted, ladder):
        divides = not format.group_size or item.target.shape[-1] % format.group_size == 0
        if divides and format not in found and (format.bits == 16 or not job.exporter.problems({item.target: format})):
            found.append(format)
    return tuple(found)


def _partners(job: Job) -> Mapping[str, tuple[str, ...]]:
    """Stored parameter to the modules whose parameters share it."""
    found: dict[str, tuple[str, ...]] = {}
    for name, owner in job.source.tied.items():
        found[owner] = (*found.get(owner, ()), name.removesuffix(".weight"))
    return found
