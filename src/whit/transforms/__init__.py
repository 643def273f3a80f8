"""In which basis weights are quantized. A new transform is one file and one name in TRANSFORMS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from whit.errors import RecipeError
from whit.transforms.awq import AWQ
from whit.transforms.base import Transform

TRANSFORMS = (AWQ,)


def parse_transform(spec: str | Mapping[str, Any] | Transform) -> Transform:
    """A transform from its name, from `{"name": ..., option: value}`, or as it is; RecipeError says what is wrong."""
    if not isinstance(spec, str | Mapping):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    for transform in TRANSFORMS:
        if transform.name == name:
            known = {field.name for field in fields(transform)}
            if unknown := sorted(set(options) - known):
                has = ", ".join(sorted(known)) or "none"
                raise RecipeError(f"transform {name}: option {unknown[0]!r} does not exist; its options are: {has}")
            return transform(**options)
    raise RecipeError(f"{name!r} is not a transform; it must be one of {', '.join(t.name for t in TRANSFORMS)}")


def transform_options(transform: Transform) -> dict[str, Any]:
    """The inverse of `parse_transform`: `{"name": ..., option: value}`."""
    return {"name": transform.name, **asdict(transform)}  # type: ignore[call-overload]


__all__ = ["AWQ", "TRANSFORMS", "Transform", "parse_transform", "transform_options"]
