"""Values that a recipe gives by name: a method, a transform, each a frozen dataclass of options."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from whit.errors import RecipeError


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


def one_of(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about a name that is not among those `known`: which ones are, and which is the nearest."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"it must be one of {', '.join(known)}; {f'did you mean {near[0]}?' if near else 'choose one'}"
