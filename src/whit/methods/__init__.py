"""Which codes are chosen. A new method is one file and one name in METHODS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from whit.errors import RecipeError
from whit.methods.base import Method
from whit.methods.clip import Clip
from whit.methods.gptq import GPTQ
from whit.methods.hqq import HQQ
from whit.methods.rtn import RTN

METHODS = (RTN, Clip, HQQ, GPTQ)


def parse_method(spec: str | Mapping[str, Any] | Method) -> Method:
    """A method from its name, from `{"name": ..., option: value}`, or as it is; RecipeError names what is wrong."""
    if not isinstance(spec, str | Mapping):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    for method in METHODS:
        if method.name == name:
            known = {field.name for field in fields(method)}
            if unknown := sorted(set(options) - known):
                has = ", ".join(sorted(known)) or "none"
                raise RecipeError(f"method {name}: option {unknown[0]!r} does not exist; its options are: {has}")
            return method(**options)
    raise RecipeError(f"{name!r} is not a method; it must be one of {', '.join(m.name for m in METHODS)}")


def method_options(method: Method) -> dict[str, Any]:
    """The inverse of `parse_method`: `{"name": ..., option: value}`."""
    return {"name": method.name, **asdict(method)}  # type: ignore[call-overload]


__all__ = ["GPTQ", "HQQ", "METHODS", "RTN", "Clip", "Method", "method_options", "parse_method"]
