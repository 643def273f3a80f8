"""Which codes are chosen. A new method is one file and one name in METHODS.

A method is `rtn`, `clip`, `hqq`, `gptq`, `refine` or `blocks`; `base` says what one is. GPTQ's walk is in `columns`,
`feedback` and `scales`; what moves under a gradient in `latent`, `learned`, `straight`, `nested`, `joined` and
`units`, and the loop that moves it in `descent`, over `samples`. `stack`, `together`, `rows` and `workers` say what
is done at a time, and by whom. `lowrank`, `rotated` and `bands` give any method to formats around other formats;
`regrid` gives codes to a matrix that had some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from whit.methods.base import Method
from whit.methods.blocks import Blocks
from whit.methods.clip import Clip
from whit.methods.gptq import GPTQ
from whit.methods.hqq import HQQ
from whit.methods.refine import Refine
from whit.methods.rtn import RTN
from whit.named import parse_named, require

METHODS = (RTN, Clip, HQQ, GPTQ, Refine, Blocks)


def parse_method(spec: str | Mapping[str, Any] | Method) -> Method:
    """A method from its name, from `{"name": ..., option: value}`, or as it is; RecipeError names what is wrong.

    An option that is a method itself is given in the same way, but by name alone only as `{"name": ...}`.
    """
    if not isinstance(spec, str | Mapping):
        require(spec, Method, "method", "it must be a name or a method such as whit.GPTQ(); give one")
        return spec
    found: Method = parse_named("method", METHODS, spec, parse_method)
    return found


def stand_in(method: Method) -> Method:
    """A quick method whose errors grow and shrink like another's, to compare many scalings of a matrix by."""
    return RTN() if method.name in (RTN.name, HQQ.name) else Clip(steps=5, smallest=0.5)


def method_options(method: Method) -> dict[str, Any]:
    """The inverse of `parse_method`: `{"name": ..., option: value}`."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    return {"name": method.name, **{k: method_options(v) if isinstance(v, Method) else v for k, v in values.items()}}


__all__ = [
    "GPTQ", "HQQ", "METHODS", "RTN", "Blocks", "Clip", "Method", "Refine", "method_options", "parse_method", "stand_in",
]  # fmt: skip
