"""Values that a recipe gives by name: a method, a transform, each a frozen dataclass of options."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from whit.errors import RecipeError, WhitError

INF = math.inf
KINDS: tuple[tuple[type, Any, str], ...] = (  # of a default, of a value, as an error names it; bool is an int too
    (bool, bool, "true or false"), (int, int, "a whole number"), (float, float | int, "a number"), (str, str, "a name"),
)  # fmt: skip


def parse_named(
    what: str, kinds: Sequence[Any], spec: str | Mapping[str, Any], nested: Callable[[Mapping[str, Any]], Any] = dict
) -> Any:
    """One of the `kinds` from its name or from `{"name": ..., option: value}`; RecipeError names what is wrong.

    `nested` makes a value of an option that is a mapping itself. `what` is what an error calls them.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    for kind in kinds:
        if kind.name == name:
            known = {field.name for field in fields(kind)}
            if unknown := sorted(set(options) - known):
                has = ", ".join(sorted(known)) or "none"
                raise RecipeError(f"{what} {name}: option {unknown[0]!r} does not exist; its options are: {has}")
            return kind(
                **{key: nested(value) if isinstance(value, Mapping) else value for key, value in options.items()}
            )
    raise RecipeError(f"{name!r} is not a {what}; {one_of(str(name), [kind.name for kind in kinds])}")


def require(value: object, kind: Any, where: str, advice: str, error: type[WhitError] = RecipeError) -> None:
    """`error`, in one sentence, where a value that a caller gives is of another type than it must be."""
    if isinstance(value, type) or not isinstance(value, kind):
        found = value.__name__ if isinstance(value, type) else type(value).__name__
        said = f"the class {found}" if isinstance(value, type) else f"of type {found}"
        raise error(f"{where}: is {said}; {advice}")


def check_options(options: Any, **bounds: tuple[float, float]) -> None:
    """RecipeError for the first field of a dataclass with a `name` that is not of its default's type, is no finite
    number where it is one, or lies outside its bounds (least, most)."""
    for field in fields(options):
        value = getattr(options, field.name)
        if value is None and field.default is None:
            continue
        if said := _must_be(value, field.default, bounds.get(field.name)):
            raise RecipeError(f"{options.name}: {field.name} {value!r}; it must be {said}; correct it")


def _must_be(value: object, default: object, bounds: tuple[float, float] | None) -> str:
    """What an option must be, where it is not; empty where it is."""
    other = (float | int, "a number") if bounds else (object, "")
    kind, said = next(((kind, said) for of, kind, said in KINDS if isinstance(default, of)), other)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        return said
    least, most = bounds or (-INF, INF)
    if not isinstance(value, float | int):
        return ""
    if not math.isfinite(value):
        return "finite"
    if least <= value <= most:
        return ""
    return f"at least {least:g}" if most == INF else f"from {least:g} to {most:g}"


def one_of(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about a name that is not among those `known`: which ones are, and which is the nearest."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"it must be one of {', '.join(known)}; {f'did you mean {near[0]}?' if near else 'choose one'}"
