"""In which basis weights are quantized. A new transform is one file and one name in TRANSFORMS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from whit.named import parse_named
from whit.transforms.awq import AWQ
from whit.transforms.base import Transform
from whit.transforms.smoothquant import SmoothQuant

TRANSFORMS = (AWQ, SmoothQuant)


def parse_transform(spec: str | Mapping[str, Any] | Transform) -> Transform:
    """A transform from its name, from `{"name": ..., option: value}`, or as it is; RecipeError says what is wrong."""
    if not isinstance(spec, str | Mapping):
        return spec
    found: Transform = parse_named("transform", TRANSFORMS, spec)
    return found


def transform_options(transform: Transform) -> dict[str, Any]:
    """The inverse of `parse_transform`: `{"name": ..., option: value}`."""
    return {"name": transform.name, **asdict(transform)}  # type: ignore[call-overload]


__all__ = ["AWQ", "TRANSFORMS", "SmoothQuant", "Transform", "parse_transform", "transform_options"]
